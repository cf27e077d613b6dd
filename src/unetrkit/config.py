"""Recipes: YAML -> typed settings <- `key=value`; an unknown name is an error that leads to the right one."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from types import UnionType
from typing import TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

from unetrkit.errors import UserError, nearest
from unetrkit.plain_yaml import dump_yaml, parse_value, parse_yaml

LARGEST_RECIPE = 64 * 2**10  # bytes


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
        return parse_yaml(packaged[str(recipe)], f"recipe `{recipe}`")
    if path.suffix.lower() not in {".yaml", ".yml"} and not path.is_file():
        raise UserError(f"there is no recipe `{recipe}`", hint=nearest(str(recipe), packaged))
    try:
        with open(path, "rb") as file:
            content = file.read(LARGEST_RECIPE + 1)
    except OSError as error:
        raise UserError(
            f"cannot read the recipe `{path}`: {error.strerror or error}",
            hint="give a YAML file that you may read, or the name of a recipe: `unetrkit info recipes`",
        ) from error
    if len(content) > LARGEST_RECIPE:
        raise UserError(
            f"`{path}` is larger than {LARGEST_RECIPE // 1024} KB: this is not a recipe",
            hint="give a YAML file of settings",
        )
    try:
        return parse_yaml(content.decode("utf-8-sig"), f"`{path}`")
    except UnicodeDecodeError as error:
        raise UserError(
            f"`{path}` is not a recipe: byte {error.start} is not UTF-8", hint="save it as UTF-8 text"
        ) from error


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
    return dump_yaml(settings.model_dump(mode="json"))


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


def _override(values: dict[str, object], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not all(part.isidentifier() for part in name.strip().split(".")):
        raise UserError(f"`{override}` is not a setting", hint="write `name=value`, as in `optim.lr=1e-4`")
    *sections, last = name.strip().split(".")
    section = values
    for part in sections:
        inner = section.setdefault(part, {})
        if not isinstance(inner, dict):
            raise UserError(
                f"`{name}` is not a setting: `{part}` is {inner!r}",
                hint=f"write either `{part}=…` or `{name}=…`",
            )
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
    if not name:  # a rule over several settings; its message names their values
        return UserError(message, hint="change one of the settings that do not go together")
    return UserError(
        f"`{name}` is {json.dumps(value, ensure_ascii=False)}: {message}", hint=_example(settings, name)
    )


def _example(settings: type[BaseModel], name: str) -> str:
    """What a setting may be: its default, where it has one."""
    section, _, rest = name.partition(".")
    field = settings.model_fields[section]
    inner = _model(field.annotation)
    if inner is not None:
        return _example(inner, rest) if rest else f"write `{name}.{next(iter(inner.model_fields))}=…`"
    default = field.get_default(call_default_factory=True)
    return "write one value of that kind" if field.is_required() else f"the default is {json.dumps(default)}"


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
