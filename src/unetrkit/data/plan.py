"""The plan: everything that must be the same for training and for predicting, as data a person can read."""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from unetrkit.config import Settings, overridden, settings_from
from unetrkit.data.files import atomic_write, read_json
from unetrkit.errors import UserError, nearest

Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Extent = Annotated[int, Field(ge=16, le=512, multiple_of=16)]

# what a person may write, for messages
SPACING = "mm along x, y and z, as in `spacing=1.5,1.5,2.0`"
INTENSITY = "as in `intensity.0.kind=window`, `intensity.0.lower=-175` and `intensity.0.upper=250`"
PATCH_SIZE = "voxels along x, y and z, multiples of 16 up to 512, as in `patch_size=96,96,96`"
LINE = 90  # characters of a list or an object that is written on one line
# one without another in it; a line break within a text is written as \n, so each of these parts two values
INNERMOST = re.compile(r"([\[{])\n +([^\n\[\]{}]++(?:\n ++[^\n\[\]{}]++)*)\n *([\]}])")


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
    def _ordered(self) -> Self:
        if not self.lower < self.upper:
            raise ValueError(f"lower ({self.lower}) must be below upper ({self.upper})")
        if self.kind == "zscore" and not (0 <= self.lower and self.upper <= 100):
            raise ValueError(f"those of a zscore are percentiles, found {self.lower} and {self.upper}")
        return self


class Plan(Settings):
    """Computed from a data set by `unetrkit prepare`, or written by hand; travels with the weights.

    Space: volumes are brought to RAS+ axes, cropped to foreground, resampled to `spacing` (mm), normalised.
    A plan without classes is of scans without labels, for pre-training.
    """

    version: Literal[1] = Field(default=1, description="prepare the plan again with this version of unetrkit")
    dataset: str
    channels: Annotated[tuple[str, ...], Field(min_length=1)]
    classes: tuple[LabelClass, ...]
    spacing: Annotated[tuple[Positive, Positive, Positive], Field(description=SPACING)]
    intensity: Annotated[tuple[Intensity, ...], Field(description=INTENSITY)]
    patch_size: Annotated[tuple[Extent, Extent, Extent], Field(description=PATCH_SIZE)]
    crop_foreground: bool = True
    # false: each case keeps its own spacing, and `spacing` is only what is usual
    resample: bool = True
    # pairs of label ids that a mirror exchanges: left and right organs
    mirror_pairs: tuple[tuple[int, int], ...] = ()
    # what the plan was computed from: for people, not for the program
    statistics: dict[str, object] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(self.intensity) != len(self.channels):
            raise ValueError(f"{len(self.channels)} channels but {len(self.intensity)} intensity entries")
        ids = [c.id for c in self.classes]
        if ids and (len(ids) < 2 or ids[0] != 0 or len(set(ids)) != len(ids)):
            raise ValueError(f"classes must begin with id 0 (background) and have different ids, found {ids}")
        sided = [i for pair in self.mirror_pairs for i in pair]
        if unknown := set(sided) - set(ids):
            raise ValueError(f"mirror_pairs names ids that are not classes: {sorted(unknown)}")
        if len(set(sided)) != len(sided):
            raise ValueError(f"mirror_pairs names an id twice: {self.mirror_pairs}")
        return self

    @model_serializer(mode="wrap")
    def _values(self, values_of: SerializerFunctionWrapHandler) -> dict[str, object]:
        values: dict[str, object] = values_of(self)
        if self.resample:  # younger than the first stores: their plans keep their bytes and hashes
            values.pop("resample", None)
        return values

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
# For pre-training; of several intensities each channel takes the one of its kind:
# swin_ssl: Swin UNETR (https://arxiv.org/abs/2111.14791), at each scan's own spacing.
# vit_ssl: the vision transformer of UNETR, https://github.com/Project-MONAI/tutorials
# dae: disruptive autoencoders (https://arxiv.org/abs/2307.16896), whose 2 mm are an option there; their
# z-score of MR leaves what is 0 at 0, ours does not.
PUBLISHED: dict[str, dict[str, Any]] = {
    name: {"patch_size": [96, 96, 96], "crop_foreground": True, **own}
    for name, own in {
        "btcv": {"spacing": [1.5, 1.5, 2.0], "intensity": [("window", -175.0, 250.0)]},
        "swin_ssl": {"resample": False, "intensity": [("window", -1000.0, 1000.0)]},
        "vit_ssl": {"spacing": [2.0, 2.0, 2.0], "intensity": [("window", -57.0, 164.0)]},
        "dae": {"resample": False, "intensity": [("window", -1000.0, 1000.0), ("zscore", 0.0, 100.0)]},
    }.items()
}


def read_plan(path: Path) -> Plan:
    """The plan in a JSON file. Raises UserError naming the file, the field and the value that is wrong."""
    return parse_plan(read_json(path), f"`{path}`")


def write_plan(path: Path, plan: Plan) -> None:
    """Writes a plan as JSON that a person can read and change."""
    atomic_write(path, plan_bytes(plan))


def plan_bytes(plan: Plan) -> bytes:
    """The bytes of a plan's file: one name a line, and short lists on the line of their name."""
    text = json.dumps(plan.model_dump(mode="json"), indent=1, ensure_ascii=False)
    return (INNERMOST.sub(_one_line, text) + "\n").encode()


def _one_line(found: re.Match[str]) -> str:
    line = re.sub(r",\n +", ", ", found[2])
    return f"{found[1]}{line}{found[3]}" if len(line) <= LINE else found[0]


def plan_hash(plan: Plan, without: Iterable[str] = ("dataset", "statistics")) -> str:
    """SHA-256 of what a plan says; where it was computed from does not count."""
    content = json.dumps(plan.model_dump(mode="json", exclude=set(without)), sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def apply_published(plan: Plan, name: str) -> Plan:
    """The plan with all that the published recipe `name` fixes. Raises UserError for an unknown name."""
    if name not in PUBLISHED:
        raise UserError(f"there is no published plan `{name}`", hint=nearest(name, PUBLISHED))
    fixed = dict(PUBLISHED[name])
    names = ("kind", "lower", "upper")
    of_kind = {one[0]: dict(zip(names, one, strict=True)) for one in fixed["intensity"]}
    own = [one.kind for one in plan.intensity] if len(of_kind) > 1 else of_kind
    fixed["intensity"] = [of_kind[kind] for kind in own]
    return parse_plan(plan.model_dump(mode="json") | fixed, f"published plan `{name}`")


def override_plan(plan: Plan, overrides: Sequence[str]) -> Plan:
    """The plan with entries replaced: `spacing=1.5,1.5,2.0`, `intensity.0.lower=-175`, in order.

    Raises UserError for an entry that a plan does not have, and for a value that it cannot take.
    """
    return parse_plan(overridden(plan.model_dump(mode="json"), overrides), "plan") if overrides else plan


def parse_plan(values: object, source: str) -> Plan:
    """A plan from plain values (JSON's). Raises UserError naming `source`, the field and its wrong value."""
    if not isinstance(values, dict):
        message = f"{source} is not a plan: expected names and values, found a {type(values).__name__}"
        raise UserError(message, hint="give the `plan.json` that `unetrkit prepare` wrote")
    return settings_from(Plan, values, source)
