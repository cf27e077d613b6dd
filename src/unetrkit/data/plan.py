"""The plan: everything that must be the same for training and for predicting, as data a person can read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, Field, ValidationError, model_validator

from unetrkit.config import Settings
from unetrkit.data.files import atomic_write, read_json
from unetrkit.errors import UserError, nearest
from unetrkit.plain_yaml import parse_value

__all__ = [
    "PUBLISHED",
    "Extent",
    "Intensity",
    "LabelClass",
    "Plan",
    "Settings",
    "apply_published",
    "override_plan",
    "parse_plan",
    "plan_hash",
    "read_plan",
    "write_plan",
]

Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Extent = Annotated[int, Field(ge=16, le=512, multiple_of=16)]


class LabelClass(Settings):
    """One class: its value in label files and its name. Its position in the plan is its network channel."""

    id: Annotated[int, Field(ge=0, le=65535)]
    name: str


class Intensity(Settings):
    """How one channel is normalised.

    ``window``: values are clipped to [lower, upper] and scaled to [0, 1] (CT, in HU; the published recipe).
    ``zscore``: (value - mean) / standard deviation of the case's own voxels (MR and other relative scales);
    ``lower`` and ``upper`` are then the clipping percentiles of the case.
    """

    kind: Literal["window", "zscore"]
    lower: Finite
    upper: Finite

    @model_validator(mode="after")
    def _ordered(self) -> Intensity:
        if not self.lower < self.upper:
            raise ValueError(f"lower ({self.lower}) must be below upper ({self.upper})")
        if self.kind == "zscore" and not (0 <= self.lower and self.upper <= 100):
            raise ValueError(
                f"lower and upper of a zscore are percentiles, found {self.lower} and {self.upper}"
            )
        return self


class Plan(Settings):
    """Computed from a data set by `unetrkit prepare`, or written by hand; travels with the weights.

    Space: volumes are brought to RAS+ axes, cropped to foreground, resampled to `spacing` (mm), normalised.
    """

    version: Literal[1] = 1
    dataset: str
    channels: Annotated[tuple[str, ...], Field(min_length=1)]
    classes: tuple[LabelClass, ...]
    spacing: tuple[Positive, Positive, Positive]
    intensity: tuple[Intensity, ...]
    patch_size: tuple[Extent, Extent, Extent]
    crop_foreground: bool = True
    # pairs of label ids that a mirror exchanges: left and right organs
    mirror_pairs: tuple[tuple[int, int], ...] = ()
    # what the plan was computed from: for people, not for the program
    statistics: dict[str, object] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> Plan:
        if len(self.intensity) != len(self.channels):
            raise ValueError(f"{len(self.channels)} channels but {len(self.intensity)} intensity entries")
        ids = [c.id for c in self.classes]
        if len(self.classes) < 2 or ids[0] != 0 or len(set(ids)) != len(ids):
            raise ValueError(f"classes must begin with id 0 (background) and have different ids, found {ids}")
        sided = [i for pair in self.mirror_pairs for i in pair]
        if unknown := set(sided) - set(ids):
            raise ValueError(f"mirror_pairs names ids that are not classes: {sorted(unknown)}")
        if len(set(sided)) != len(sided):
            raise ValueError(f"mirror_pairs names an id twice: {self.mirror_pairs}")
        return self

    @property
    def mirrored(self) -> tuple[int, ...]:
        """For each class its index in a mirror image: paired organs change places.

        A body reflected along any one axis is the same mirror image, turned: an odd number of flips mirrors,
        an even number is a rotation and exchanges nothing.
        """
        index = {c.id: k for k, c in enumerate(self.classes)}
        other = {a: b for pair in self.mirror_pairs for a, b in (pair, pair[::-1])}
        return tuple(index[other.get(c.id, c.id)] for c in self.classes)


# What the published recipes fix where the computed plan decides by itself.
# btcv: UNETR and Swin UNETR on abdominal CT, https://github.com/Project-MONAI/research-contributions
PUBLISHED: dict[str, dict[str, object]] = {
    "btcv": {
        "spacing": [1.5, 1.5, 2.0],
        "intensity": [{"kind": "window", "lower": -175.0, "upper": 250.0}],
        "patch_size": [96, 96, 96],
        "crop_foreground": True,
    },
}


EXAMPLES = {
    "spacing": "mm along x, y and z, as in `spacing=1.5,1.5,2.0`",
    "patch_size": "voxels along x, y and z, multiples of 16 up to 512, as in `patch_size=96,96,96`",
    "intensity": "as in `intensity.0.kind=window`, `intensity.0.lower=-175` and `intensity.0.upper=250`",
    "crop_foreground": "`crop_foreground=true` or `crop_foreground=false`",
    "version": "prepare the plan again with this version of unetrkit",
}


def read_plan(path: Path) -> Plan:
    """The plan in a JSON file. Raises UserError naming the file, the field and the value that is wrong."""
    return parse_plan(read_json(path), f"`{path}`")


def write_plan(path: Path, plan: Plan) -> None:
    """Writes a plan as JSON that a person can read and change."""
    atomic_write(path, plan_bytes(plan))


def plan_bytes(plan: Plan) -> bytes:
    """The bytes of a plan's file."""
    return (json.dumps(plan.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n").encode()


def plan_hash(plan: Plan, without: Iterable[str] = ("dataset", "statistics")) -> str:
    """SHA-256 of what a plan says; where it was computed from does not count.

    >>> small = {"dataset": "A", "channels": ["CT"], "spacing": [1, 1, 1], "patch_size": [96, 96, 96],
    ...     "classes": [{"id": 0, "name": "background"}, {"id": 1, "name": "liver"}],
    ...     "intensity": [{"kind": "window", "lower": -175, "upper": 250}]}
    >>> plan_hash(parse_plan(small, "A")) == plan_hash(parse_plan(small | {"dataset": "B"}, "B"))
    True
    """
    content = json.dumps(
        plan.model_dump(mode="json", exclude=set(without)), sort_keys=True, ensure_ascii=True
    )
    return hashlib.sha256(content.encode()).hexdigest()


def apply_published(plan: Plan, name: str) -> Plan:
    """The plan with all that the published recipe `name` fixes. Raises UserError for an unknown name."""
    if name not in PUBLISHED:
        raise UserError(f"there is no published plan `{name}`", hint=nearest(name, PUBLISHED))
    if len(plan.channels) != 1:
        raise UserError(
            f"the published plan `{name}` is for 1 channel, `{plan.dataset}` has {len(plan.channels)}",
            hint="leave out `--published`: a plan is then computed from your data",
        )
    return parse_plan(plan.model_dump(mode="json") | PUBLISHED[name], f"published plan `{name}`")


def override_plan(plan: Plan, overrides: Sequence[str]) -> Plan:
    """The plan with entries replaced: `spacing=1.5,1.5,2.0`, `intensity.0.lower=-175`, in order.

    Raises UserError for an entry that a plan does not have, and for a value that it cannot take.
    """
    values = plan.model_dump(mode="json")
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals:
            raise UserError(
                f"`{override}` is not a plan entry", hint="write `name=value`, as in `spacing=1.5,1.5,2.0`"
            )
        _replace(values, name.strip(), parse_value(text))
    return parse_plan(values, "plan") if overrides else plan


def _replace(values: dict[str, object], name: str, value: object) -> None:
    """Puts `value` at a dotted name; a part of it that is a number is a position in a list."""
    *parts, last = name.split(".")
    inner: object = values
    for part in [*parts, last]:
        if not isinstance(inner, (dict, list)):
            raise UserError(
                f"`{name}` is not a plan entry: there is nothing inside {inner!r}",
                hint="give the whole entry, as in `spacing=1.5,1.5,2.0`",
            )
        entries: dict = inner if isinstance(inner, dict) else {str(i): v for i, v in enumerate(inner)}
        if part not in entries:
            raise UserError(f"`{name}` is not a plan entry", hint=nearest(part, entries))
        outer, inner = inner, entries[part]
    if isinstance(outer, dict):
        outer[last] = value
    else:
        outer[int(last)] = value


def parse_plan(values: object, source: str) -> Plan:
    """A plan from plain values (JSON's). Raises UserError naming `source`, the field and its wrong value."""
    if not isinstance(values, Mapping):
        raise UserError(
            f"{source} is not a plan: expected names and values, found a {type(values).__name__}",
            hint="give the `plan.json` that `unetrkit prepare` wrote",
        )
    try:
        # pydantic's strict mode for JSON: a list may be a tuple, but "1.5" is not a number
        return Plan.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        raise _explain(error, source) from None


def _explain(error: ValidationError, source: str) -> UserError:
    """One line for the first problem; an unknown name first, since it is often why another one is missing."""
    problems = error.errors(include_url=False)
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    name = ".".join(map(str, problem["loc"]))
    if problem["type"] == "extra_forbidden":
        return UserError(
            f"{source}: `{name}` is not a plan entry", hint=nearest(str(problem["loc"][-1]), _known(name))
        )
    if problem["type"] == "missing":
        return UserError(
            f"{source}: `{name}` is missing", hint="`unetrkit prepare` writes a whole plan to start from"
        )
    message = problem["msg"].removeprefix("Value error, ")
    if isinstance(problem["input"], Mapping):  # a rule over several fields; its message names their values
        where = f"{source}: `{name}`" if name else source
        return UserError(f"{where}: {message}", hint="change one of the two so that they agree")
    message = message.replace("Input should be ", "expected ").replace("valid array", "list")
    found = json.dumps(problem["input"], ensure_ascii=False)
    example = EXAMPLES.get(str(problem["loc"][0]), "see a `plan.json` that `unetrkit prepare` wrote")
    return UserError(f"{source}: `{name}` is {found}: {message}", hint=example)


def _known(name: str) -> list[str]:
    """The fields beside the one at the end of a dotted name."""
    field = Plan.model_fields.get(name.partition(".")[0])
    inner = (
        [a for a in get_args(field.annotation) if isinstance(a, type) and issubclass(a, BaseModel)]
        if field
        else []
    )
    return list((inner[0] if inner else Plan).model_fields)
