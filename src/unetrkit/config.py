"""Recipes: YAML -> typed settings <- `key=value`; an unknown name is an error that leads to the right one."""

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from unetrkit.errors import UserError, nearest, refuse_pipe
from unetrkit.plain_yaml import dump_yaml, parse_value, parse_yaml

LARGEST_RECIPE = 64 * 2**10  # bytes
# what a recipe names only if it is one of this command
COMMANDS = {"objective": "pretrain", "network": "train"}


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
    for name, command in COMMANDS.items():
        if name in values and name not in settings.model_fields:
            message = f"`{recipe}` is a recipe of `unetrkit {command}`"
            raise UserError(message, hint=f"`unetrkit {command} {recipe} …`")
    source = f"`{recipe}`" if isinstance(recipe, Path) and not overrides else ""  # else words may lack it
    return settings_from(settings, overridden(values, overrides), source)


def listed(value: object) -> object:
    """For a setting that is a list of names or paths: `a,b` on the command line is one text until here.

    >>> listed("a,b"), listed(["a", "b"]), listed(3)
    (('a', 'b'), ('a', 'b'), 3)
    """
    if isinstance(value, str):
        return tuple(value.split(","))
    return tuple(value) if isinstance(value, list) else value


def apply_overrides(settings: type[S], overrides: Sequence[str]) -> S:
    """The defaults of `settings` with `name=value` overrides. Raises UserError as `load_recipe` does.

    >>> class Window(Settings):
    ...     overlap: float = 0.5
    >>> apply_overrides(Window, ["overlap=0.25"])
    Window(overlap=0.25)
    """
    return settings_from(settings, overridden({}, overrides))


def read_recipe(recipe: str | Path) -> dict[str, object]:
    """The names and values that a recipe states: a packaged one by its name, else the file at that path."""
    packaged = _packaged()
    path = Path(recipe)
    if str(recipe) in packaged:
        return parse_yaml(packaged[str(recipe)], f"recipe `{recipe}`")
    if path.suffix.lower() not in {".yaml", ".yml"} and not path.is_file():
        raise UserError(f"there is no recipe `{recipe}`", hint=nearest(str(recipe), packaged))
    hint = "give a YAML file of settings, or the name of a recipe: `unetrkit info recipes`"
    try:
        refuse_pipe(path)
        with open(path, "rb") as file:
            content = file.read(LARGEST_RECIPE + 1)
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read the recipe `{path}`: {error.strerror or error}", hint=hint) from error
    except UnicodeDecodeError as error:
        raise UserError(f"`{path}` is not a recipe: byte {error.start} is not UTF-8", hint=hint) from error
    if len(content) > LARGEST_RECIPE:
        raise UserError(f"`{path}` is larger than {LARGEST_RECIPE // 1024} KB: not a recipe", hint=hint)
    return parse_yaml(text, f"`{path}`")


def recipes() -> list[tuple[str, str]]:
    """The packaged recipes and the one-line description that each begins with."""
    return [(name, text.partition("\n")[0].lstrip("# ")) for name, text in _packaged().items()]


def _packaged() -> dict[str, str]:
    folder = resources.files("unetrkit") / "recipes"
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".yaml")), key=lambda f: f.name)
    return {file.name.removesuffix(".yaml"): file.read_text(encoding="utf-8") for file in files}


def settings_from(settings: type[S], values: Mapping[str, object], source: str = "") -> S:
    """Typed settings from plain values. Raises UserError naming setting, value and what was expected."""
    try:
        # of pydantic's strict modes JSON's is the one in which a list may be a tuple and a string a path;
        # `steps: true` is an error, and so is `seed: "1"`
        return settings.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        message, hint = _explain(settings, values, error)
        raise UserError(f"{source}: {message}" if source else message, hint=hint) from None


def overridden(values: dict[str, object], overrides: Sequence[str]) -> dict[str, object]:
    """Plain values with `name=value` overrides in order; a number in a name is a position in a list.

    >>> overridden({"optim": {"lr": 0.1}, "spacing": [1, 1, 2]}, ["optim.lr=1e-4", "spacing.2=3"])
    {'optim': {'lr': 0.0001}, 'spacing': [1, 1, 3]}
    """
    for override in overrides:
        name, equals, text = override.partition("=")
        parts = name.strip().split(".")
        if not equals or not all(re.fullmatch(r"\w+", part) for part in parts):
            message = f"`{override}` is not a setting"
            raise UserError(message, hint="write `name=value`, as in `optim.lr=1e-4`")
        values = _replaced(values, parts, parse_value(text))
    return values


def _replaced(inner: Any, parts: Sequence[str], value: object, depth: int = 0) -> Any:
    if depth == len(parts):
        return value
    part = parts[depth]
    if isinstance(inner, dict):
        return inner | {part: _replaced(inner.get(part, {}), parts, value, depth + 1)}
    if isinstance(inner, list) and part in map(str, range(len(inner))):
        k = int(part)
        return [*inner[:k], _replaced(inner[k], parts, value, depth + 1), *inner[k + 1 :]]
    name, above = ".".join(parts), ".".join(parts[:depth])
    message = f"`{name}` is not a setting: `{above}` is {inner!r}"
    raise UserError(message, hint=f"write either `{above}=…` or the name of a setting that is there")


def to_yaml(settings: Settings) -> str:
    """The whole of the settings as YAML that `load_recipe` reads back to equal settings."""
    return dump_yaml(settings.model_dump(mode="json"))


def flatten(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Dotted names and values; of an empty mapping there are none.

    >>> flatten({"optim": {"lr": 0.1}, "fold": 2, "network_options": {}})
    {'optim.lr': 0.1, 'fold': 2}
    """
    flat: dict[str, object] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _explain(settings: type[Settings], values: object, error: ValidationError) -> tuple[str, str]:
    """Message and hint for the first problem; unknown names first: often they are why another is missing."""
    problems = error.errors(include_url=False, include_context=False)
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    name, value = _locate(values, problem["loc"])
    if problem["type"] == "extra_forbidden":
        if isinstance(value, Mapping) and value:  # `train.lr` where there is no section `train`
            name = next(iter(flatten({name: value})))
        return f"`{name}` is not a setting", _nearest_name(name, list(_names(settings)))
    if problem["type"] == "missing" and isinstance(value, Mapping):
        name = ".".join(map(str, problem["loc"]))
        return f"`{name}` is not given", f"write `{name}=…`"
    message = problem["msg"].removeprefix("Value error, ").replace("Input should be ", "expected ")
    message = "expected more values" if problem["type"] == "missing" else message
    if isinstance(value, Mapping) and problem["type"] == "value_error":  # its message names their values
        where = f"`{name}`: " if name else ""
        return where + message, "change one of the settings that do not go together"
    message = message.replace("a valid array", "a list")
    return f"`{name}` is {json.dumps(value, ensure_ascii=False)}: {message}", _example(settings, name)


def _locate(values: object, location: Sequence[int | str]) -> tuple[str, object]:
    """The dotted name and the value at a pydantic location, as far as the values go.

    Locations also hold the members of unions, which are no names.
    """
    names: list[str] = []
    for part in location:
        if isinstance(values, Mapping) and part in values:
            values = values[part]
        elif isinstance(values, list) and isinstance(part, int) and part < len(values):
            values = values[part]
        else:
            continue
        names.append(str(part))
    return ".".join(names), values


def _example(settings: type[BaseModel], name: str) -> str:
    """What a setting may be: its description or its default, where it has one."""
    section, _, rest = _without_positions(name).partition(".")
    field = settings.model_fields[section]
    inner = _model(field.annotation)
    if inner is not None and rest:
        return _example(inner, rest)
    if field.description:
        return field.description
    if inner is not None:
        return f"write `{name}.{next(iter(inner.model_fields))}=…`"
    if field.is_required():
        return "write one value of that kind"
    return f"the default is {json.dumps(field.get_default(call_default_factory=True))}"


def _names(settings: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in settings.model_fields.items():
        inner = _model(field.annotation)
        if inner is None:
            yield prefix + name
        else:
            yield from _names(inner, f"{prefix}{name}.")


def _model(annotation: object) -> type[BaseModel] | None:
    """The settings in a type: `Optim` of `Optim | None`, `Intensity` of `tuple[Intensity, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((m for m in map(_model, get_args(annotation)) if m), None)


def _without_positions(name: str) -> str:
    return re.sub(r"\.[0-9]+\b", "", name)


def _nearest_name(name: str, known: list[str]) -> str:
    """The nearest full name, by its last part above all: `lr` and `train.lr` lead to `optim.lr`."""
    section, _, last = name.rpartition(".")
    siblings = [k for k in known if k.rpartition(".")[0] == _without_positions(section)]

    def likeness(candidate: str) -> float:
        pairs = (last, candidate.rpartition(".")[2]), (name, candidate)
        of_last, of_whole = (difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)
        return of_last + 0.01 * of_whole

    best = max(known, key=likeness)
    if likeness(best) < 0.6:
        return "known: " + ", ".join(siblings or known)
    if best in siblings and section:  # `intensity.0.lower`, with its position
        best = f"{section}.{best.rpartition('.')[2]}"
    return f"did you mean `{best}`?"
