"""Recipes: YAML -> typed settings <- `key=value`; an unknown name is an error that leads to the right one."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from types import UnionType
from typing import TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from unetrkit.errors import UserError, nearest

LARGEST_RECIPE = 64 * 2**10  # bytes
DEEPEST_RECIPE = 16  # nested lists and mappings


class Settings(BaseModel):
    """Base of everything that a person may write: frozen, unknown names are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


S = TypeVar("S", bound=Settings)


def load_recipe(settings: type[S], recipe: str | Path, overrides: Sequence[str] = ()) -> S:
    """The settings that a recipe and what was written after it on the command line make together.

    recipe: the name of a packaged recipe, or a YAML file (a run's own `config.yaml` repeats that run).
    overrides: `section.name=value`, in order; a value is a YAML scalar, or a list as `96,96,96` or `[a, b]`.
    Raises UserError for an unknown recipe, an unknown name, a value of the wrong type, a missing setting.
    """
    values = read_recipe(recipe)
    for override in overrides:
        _override(values, override)
    return settings_from(settings, values)


def apply_overrides(settings: type[S], overrides: Sequence[str]) -> S:
    """The defaults of `settings` with `name=value` overrides. Raises UserError as `load_recipe` does.

    >>> class Window(Settings):
    ...     overlap: float = 0.5
    >>> apply_overrides(Window, ["overlap=0.25"])
    Window(overlap=0.25)
    """
    values: dict[str, object] = {}
    for override in overrides:
        _override(values, override)
    return settings_from(settings, values)


def read_recipe(recipe: str | Path) -> dict[str, object]:
    """The names and values that a recipe states: a packaged one by its name, else the file at that path."""
    packaged = _packaged()
    path = Path(recipe)
    if str(recipe) in packaged:
        return parse_yaml(packaged[str(recipe)], f"recipe {recipe}")
    if path.suffix.lower() not in {".yaml", ".yml"} and not path.is_file():
        raise UserError(f"there is no recipe `{recipe}`", hint=nearest(str(recipe), packaged))
    try:
        with open(path, "rb") as file:
            content = file.read(LARGEST_RECIPE + 1)
    except OSError as error:
        raise UserError(f"cannot read the recipe `{path}`: {error.strerror or error}") from error
    if len(content) > LARGEST_RECIPE:
        raise UserError(f"`{path}` is larger than {LARGEST_RECIPE // 1024} KB: this is not a recipe")
    try:
        return parse_yaml(content.decode("utf-8-sig"), str(path))
    except UnicodeDecodeError as error:
        raise UserError(f"`{path}` is not a recipe: byte {error.start} is not UTF-8") from error


def recipes() -> list[tuple[str, str]]:
    """The packaged recipes and the one-line description that each begins with."""
    return [(name, text.partition("\n")[0].lstrip("# ")) for name, text in _packaged().items()]


def _packaged() -> dict[str, str]:
    folder = resources.files("unetrkit") / "recipes"
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".yaml")), key=lambda f: f.name)
    return {file.name.removesuffix(".yaml"): file.read_text(encoding="utf-8") for file in files}


def settings_from(settings: type[S], values: Mapping[str, object]) -> S:
    """Typed settings from plain values. Raises UserError naming setting, value and what was expected."""
    try:
        # of pydantic's strict modes JSON's is the one in which a list may be a tuple and a string a path;
        # `steps: true` is an error, and so is `seed: "1"`
        return settings.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        raise _explain(settings, values, error) from None


def to_yaml(settings: Settings) -> str:
    """The whole of the settings as YAML that `load_recipe` reads back to equal settings."""
    return yaml.dump(settings.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def flatten(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Dotted names and values.

    >>> flatten({"optim": {"lr": 0.1}, "fold": 2})
    {'optim.lr': 0.1, 'fold': 2}
    """
    flat: dict[str, object] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def parse_yaml(text: str, source: str) -> dict[str, object]:
    """One YAML mapping, by YAML 1.2's core schema: no tags, no anchors, no name twice, no surprises."""
    try:
        _refuse_what_a_recipe_never_needs(text, source)
        # S506: the loader derives from SafeLoader and its tags were refused above
        values = yaml.load(text, Loader=_Loader)  # noqa: S506
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" (line {where.line + 1})" if where else ""
        raise UserError(f"{source} is not YAML{line}: {getattr(error, 'problem', None) or error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{source} must hold names and values, found a {type(values).__name__}")
    return values


def _refuse_what_a_recipe_never_needs(text: str, source: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1 if event.start_mark else 0
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if tag := getattr(event, "tag", None):
            raise UserError(f"{source}, line {line}: YAML tags are not allowed, found `{tag}`")
        if getattr(event, "anchor", None):  # an alias has it too; nine of them can describe a gigabyte
            raise UserError(f"{source}, line {line}: YAML anchors and aliases are not allowed")
        if depth > DEEPEST_RECIPE:
            raise UserError(f"{source}, line {line}: nested deeper than {DEEPEST_RECIPE}")


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars. PyYAML's are 1.1's: there `1e-4` is text, `off` false, `010` 8, `1:30` 90."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012 - PyYAML's own class-level table, replaced

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                raise yaml.MarkedYAMLError(problem="names must be words", problem_mark=key.start_mark)
            if key.value in seen:
                problem = f"`{key.value}` is there twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep=True)

    def construct_number(self, node: yaml.ScalarNode) -> float | int:
        number = float(node.value)
        # `steps: 5e3` is what a person means by 5000
        return int(number) if "." not in node.value and number.is_integer() else number


_NUMBER = r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
for _kind, _pattern, _first in (
    ("null", "null|~|", ["n", "~", ""]),
    ("bool", "[tT]rue|[fF]alse", list("tTfF")),
    ("int", "[-+]?(?:0|[1-9][0-9]{0,17})", list("-+0123456789")),
    ("float", _NUMBER, list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_pattern})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_number)


class _Dumper(yaml.SafeDumper):
    """Flat lists on one line; quotes where either version of YAML would read a string as something else."""


def _flow_list(dumper: yaml.SafeDumper, value: list) -> yaml.Node:
    flow = all(not isinstance(item, (list, dict)) for item in value)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=flow)


def _string(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    special = bool(re.match(f"^(?:{_NUMBER})$", value))
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="'" if special else None)


_Dumper.add_representer(list, _flow_list)
_Dumper.add_representer(str, _string)


def parse_value(text: str) -> object:
    """The value of a `key=value`.

    >>> [parse_value(text) for text in ("1e-4", "off", "true", "null", "96,96,96", "[3, 6]", "a: b", "5e3")]
    [0.0001, 'off', True, None, [96, 96, 96], [3, 6], 'a: b', 5000]
    """
    text = text.strip()
    if re.match(f"^{_NUMBER}(?:,{_NUMBER})+$", text):
        text = f"[{text}]"
    if text[:1] in {"[", "{", '"', "'"}:
        return parse_yaml(f"value: {text}", f"`{text}`")["value"]
    # anything else is one scalar as it stands: a path may hold `#`, `: ` or begin with `*`
    loader = _Loader("")
    tag = loader.resolve(yaml.ScalarNode, text, (True, False))
    return loader.construct_object(yaml.ScalarNode(tag, text))


def _override(values: dict[str, object], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not all(part.isidentifier() for part in name.strip().split(".")):
        raise UserError(f"`{override}` is not a setting", hint="write `name=value`, as in `optim.lr=1e-4`")
    *sections, last = name.strip().split(".")
    section = values
    for part in sections:
        inner = section.setdefault(part, {})
        if not isinstance(inner, dict):
            raise UserError(f"`{name}` is not a setting: `{part}` is {inner!r}")
        section = inner
    section[last] = parse_value(text)


def _explain(settings: type[Settings], values: Mapping[str, object], error: ValidationError) -> UserError:
    """One line for the first problem; an unknown name first, since it is often why another one is missing."""
    problems = error.errors(include_url=False, include_context=False)
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    name = _name(settings, problem["loc"])
    value: object = values
    for part in name.split(".") if name else ():
        value = value.get(part) if isinstance(value, Mapping) else None
    if problem["type"] == "extra_forbidden":
        if isinstance(value, Mapping) and value:  # `train.lr` where there is no section `train`
            name = next(iter(flatten({name: value})))
        return UserError(f"`{name}` is not a setting", hint=_nearest_name(name, list(_names(settings))))
    if problem["type"] == "missing" and value is None:
        return UserError(f"`{name}` is not given", hint=f"write `{name}=…`")
    message = problem["msg"].removeprefix("Value error, ")
    if message.startswith("Input should be "):
        message = "expected " + message.removeprefix("Input should be ")
    if problem["type"] == "missing":
        message = "expected more values"
    return UserError(f"`{name}` is {json.dumps(value, ensure_ascii=False)}: {message}" if name else message)


def _name(settings: type[Settings], location: tuple[int | str, ...]) -> str:
    """The dotted name in a pydantic location, without the union members and list positions that follow it."""
    parts: list[str] = []
    model: type[BaseModel] | None = settings
    for part in location:
        if model is None:
            break
        parts.append(str(part))
        field = model.model_fields.get(str(part))
        model = _model(field.annotation) if field else None
    return ".".join(parts)


def _names(settings: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in settings.model_fields.items():
        inner = _model(field.annotation)
        if inner is None:
            yield prefix + name
        else:
            yield from _names(inner, f"{prefix}{name}.")


def _model(annotation: object) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, UnionType):
        return next((m for m in map(_model, get_args(annotation)) if m), None)
    return None


def _nearest_name(name: str, known: list[str]) -> str:
    """The nearest full name, by its last part above all: `lr` and `train.lr` lead to `optim.lr`."""

    def likeness(candidate: str) -> float:
        pairs = (name.rpartition(".")[2], candidate.rpartition(".")[2]), (name, candidate)
        last, whole = (difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)
        return last + 0.01 * whole

    best = max(known, key=likeness)
    if likeness(best) >= 0.6:
        return f"did you mean `{best}`?"
    section = name.rpartition(".")[0]
    siblings = [k for k in known if k.rpartition(".")[0] == section] or known
    return "known: " + ", ".join(siblings)
