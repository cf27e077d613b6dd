"""What a data set is like, and the plan that follows from it.

The idea is nnU-Net's (https://doi.org/10.1038/s41592-020-01008-z), cut down to what a fixed network needs.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from unetrkit.data.datalist import Case, Dataset
from unetrkit.data.geometry import spacing_of, to_ras, turn
from unetrkit.data.plan import Intensity, LabelClass, Plan
from unetrkit.data.prepare import read_pair
from unetrkit.data.preprocess import foreground_box
from unetrkit.data.processes import for_each
from unetrkit.errors import UserError

Triple = tuple[int, int, int]
Extent = tuple[float, float, float]  # mm
Progress = Callable[[int, int, str], None]

PERCENTILES = (0.5, 99.5)
SAMPLES = 10_000  # foreground voxels of each case that the percentiles of the set are taken from
VOXELS = 96**3  # of a patch, at most: the published patch
SMALLEST, LARGEST = 32, 160  # voxels of a patch along an axis
BODY = Intensity(kind="window", lower=-500, upper=3000)  # what is not air, before a window is known
RELATIVE = Intensity(kind="zscore", lower=PERCENTILES[0], upper=PERCENTILES[1])


@dataclass(frozen=True)
class Fingerprint:
    """What the plan needs of one case; in RAS+ axes. Boxes are the foreground's extents, in mm."""

    shape: Triple
    spacing: Extent
    body_box: Extent  # of what is not air, if this is CT
    relative_box: Extent  # of what is above the minimum
    counts: dict[int, int]  # voxels per label id
    samples: np.ndarray  # c n: values of foreground voxels
    like_ct: tuple[bool, ...]  # per channel: whole numbers from -500 or below


def make_plan(dataset: Dataset, *, workers: int | None = None, progress: Progress | None = None) -> Plan:
    """The plan of a data set, from every labelled training and validation case, each read once.

    spacing: the median along each axis. intensity: a window between the percentiles 0.5 and 99.5 of all
    foreground voxels where a channel is CT (declared so, or not declared and alike), else a z-score.
    patch_size: `patch_size_for`. classes: the declared ones, else the values found.
    mirror_pairs: `find_mirror_pairs`.
    Raises UserError for a case that cannot be read, and where no voxel is labelled.
    """
    cases = [case for case in dataset.cases if case.label is not None and case.split != "test"]
    if not cases:
        raise UserError(
            f"`{dataset.name}` has no labelled case to plan from",
            hint="add cases with an `image` and a `label` to `training`",
        )
    found: dict[int, Fingerprint] = {}
    for done, (position, one) in enumerate(for_each(fingerprint, cases, workers, lambda case: case.name), 1):
        found[position] = one
        if progress:
            progress(done, len(cases), cases[position].name)
    # in the order of the data set, whatever the workers did
    prints = [found[position] for position in range(len(cases))]
    _require_channels(dataset, cases, prints)
    return plan_from(dataset, prints)


def _require_channels(dataset: Dataset, cases: Sequence[Case], prints: Sequence[Fingerprint]) -> None:
    counts = [len(one.samples) for one in prints]
    expected = len(dataset.channels) or counts[0]
    for case, count in zip(cases, counts, strict=True):
        if count != expected:
            other = "are declared" if dataset.channels else f"has `{cases[0].images[0]}`"
            raise UserError(
                f"`{case.images[0]}` has {count} channels, {expected} {other}",
                hint="name every channel in `channel_names`, and give every case all of them",
            )


def fingerprint(case: Case) -> Fingerprint:
    """Reads one labelled case."""
    image, label = read_pair(case)
    upright, axes, flips = to_ras(image)
    label = turn(label[0], axes, flips)
    shape, spacing = upright.array.shape[1:], spacing_of(upright.affine)
    ids, counts = np.unique(label, return_counts=True)
    foreground = np.flatnonzero(label)
    if len(foreground) > SAMPLES:
        foreground = np.random.default_rng(0).choice(foreground, SAMPLES, replace=False, shuffle=False)
    return Fingerprint(
        shape=shape,
        spacing=spacing,
        body_box=_extent(upright.array, BODY, spacing),
        relative_box=_extent(upright.array, RELATIVE, spacing),
        counts=dict(zip(ids.tolist(), counts.tolist(), strict=True)),
        samples=np.stack([channel[np.unravel_index(foreground, shape)] for channel in upright.array]),
        like_ct=tuple(bool(c.min() <= -500 and (c == np.rint(c)).all()) for c in image.array),
    )


def _extent(array: np.ndarray, something: Intensity, spacing: Sequence[float]) -> Extent:
    """The foreground box in mm."""
    box = foreground_box(array, (something,) * len(array))
    x, y, z = ((stop - start) * mm for (start, stop), mm in zip(box, spacing, strict=True))
    return x, y, z


def plan_from(dataset: Dataset, prints: Sequence[Fingerprint]) -> Plan:
    """The plan that follows from the fingerprints of a data set's cases."""
    counts = sum((Counter(one.counts) for one in prints), Counter())
    if not set(counts) - {0}:
        raise UserError(
            f"no voxel of `{dataset.name}` is labelled: there is nothing to learn",
            hint="check that the labels are the drawn masks: `unetrkit check` counts their voxels",
        )
    channels = dataset.channels or tuple(f"channel {c}" for c in range(prints[0].samples.shape[0]))
    samples = np.concatenate([one.samples for one in prints], axis=1)
    is_ct = [_is_ct(name, all(one.like_ct[c] for one in prints)) for c, name in enumerate(channels)]
    intensity = tuple(_window(values) if ct else RELATIVE for ct, values in zip(is_ct, samples, strict=True))
    x, y, z = (float(f"{mm:.6g}") for mm in np.median([one.spacing for one in prints], axis=0))
    extent = np.median([one.body_box if all(is_ct) else one.relative_box for one in prints], axis=0).tolist()
    classes = _classes(dataset.labels, set(counts))
    return Plan(
        dataset=dataset.name,
        channels=channels,
        classes=classes,
        spacing=(x, y, z),
        intensity=intensity,
        patch_size=patch_size_for(extent, (x, y, z)),
        mirror_pairs=find_mirror_pairs({c.id: c.name for c in classes}),
        statistics=_statistics(prints, counts, classes, channels, samples),
    )


def patch_size_for(extent: Sequence[float], spacing: Sequence[float]) -> Triple:
    """The patch for a foreground of `extent` mm: all of it where that is small enough.

    Each axis is the extent in voxels, rounded up to a multiple of 16 within 32 and 160; then the axis that is
    longest in mm loses 16 voxels until the patch has no more than 96 x 96 x 96.

    >>> patch_size_for((35, 50, 36), (1, 1, 1))
    (48, 64, 48)
    >>> patch_size_for((380, 300, 450), (1.5, 1.5, 2.0))
    (96, 112, 80)
    >>> patch_size_for((400, 300, 60), (0.8, 0.8, 5.0))
    (160, 160, 32)
    """
    size = [
        min(max(16 * int(np.ceil(round(mm / step, 3) / 16)), SMALLEST), LARGEST)
        for mm, step in zip(extent, spacing, strict=True)
    ]
    while np.prod(size) > VOXELS:
        axis = max((a for a in range(3) if size[a] > SMALLEST), key=lambda a: (size[a] * spacing[a], size[a]))
        size[axis] -= 16
    return size[0], size[1], size[2]


# words for a side, and the same word for the other side
SIDES = {"left": "right", "l": "r", "lt": "rt", "lh": "rh"}
SIDES |= {right: left for left, right in SIDES.items()}
# in the heart left and right are names of parts that are not alike: its mirror image keeps them
HEART = {"heart", "atrium", "atrial", "cardiac", "myocardium", "la", "ra", "lv", "rv"}


def find_mirror_pairs(names: Mapping[int, str]) -> tuple[tuple[int, int], ...]:
    """Pairs of ids whose names differ by nothing but the side, so that a left-right mirror exchanges them.

    Sides are words (`kidney_right`, `RightParotid`, `Parotid_L`, `Left-Thalamus`, `ctx_lh_S`), or the first
    letter of one word (`rkid`). A name without its other half is in no pair, and neither are the chambers of
    the heart.

    >>> find_mirror_pairs({0: "background", 1: "spleen", 2: "rkid", 3: "lkid", 4: "rad", 6: "lad"})
    ((2, 3), (4, 6))
    """
    words = {id_: tuple(re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)) for id_, name in names.items()}
    words = {id_: tuple(word.lower() for word in found) for id_, found in words.items()}
    known = {found: id_ for id_, found in words.items() if list(words.values()).count(found) == 1}
    pairs = set()
    for id_, found in words.items():
        if HEART & set(found) or ("ventricle" in found and set(found) <= {*SIDES, "ventricle"}):
            continue
        other = known.get(tuple(SIDES.get(word, word) for word in found), id_)
        if other == id_ and len(found) == 1 and found[0][:1] in {"l", "r"}:
            other = known.get((SIDES[found[0][0]] + found[0][1:],), id_)
        if other != id_ and found in known:
            pairs.add((min(id_, other), max(id_, other)))
    return tuple(sorted(pairs))


def _is_ct(name: str, alike: bool) -> bool:
    """What the name says, or the values where it says nothing or two things (`CT or MR`)."""
    words = {word for word in re.findall(r"[a-z0-9]+", name.lower()) if not word.isdigit()}
    declared = bool(words & {"ct", "cbct", "cta", "cect", "ncct"})
    says_nothing = words <= {"channel", "image"}
    says_two = declared and bool(words & {"mr", "mri", "pet"})
    return alike if says_nothing or says_two else declared


def _window(values: np.ndarray) -> Intensity:
    """Whole HU; a scale of its own (values in [0, 1], say) keeps four digits."""
    lower, upper = (float(value) for value in np.percentile(values, PERCENTILES))
    if upper - lower >= 50:
        lower, upper = float(np.floor(lower)), float(np.ceil(upper))
    else:
        lower, upper = float(f"{lower:.4g}"), float(f"{upper:.4g}")
    return Intensity(kind="window", lower=lower, upper=upper if upper > lower else lower + 1)


def _classes(declared: Mapping[int, str], found: Iterable[int]) -> tuple[LabelClass, ...]:
    names = dict(declared) or {id_: f"class {id_}" for id_ in found if id_ != 0}
    names = {0: declared.get(0, "background")} | names
    return tuple(LabelClass(id=id_, name=names[id_]) for id_ in sorted(names))


def _statistics(
    prints: Sequence[Fingerprint],
    counts: Counter[int],
    classes: Sequence[LabelClass],
    channels: Sequence[str],
    samples: np.ndarray,
) -> dict[str, object]:
    """For a person who wants to know where the plan comes from."""
    total = sum(counts.values())
    three = (0, 50, 100)
    ladder = (0, 0.5, 5, 50, 95, 99.5, 100)
    return {
        "cases": len(prints),
        "shape (smallest, median, largest)": np.percentile([p.shape for p in prints], three, axis=0).tolist(),
        "spacing (smallest, median, largest)": np.percentile([p.spacing for p in prints], three, axis=0)
        .round(4)
        .tolist(),
        "share of voxels": {c.name: float(f"{counts[c.id] / total:.3g}") for c in classes},
        f"foreground intensity (percentiles {', '.join(map(str, ladder))})": {
            name: [float(f"{v:.5g}") for v in np.percentile(values, ladder)]
            for name, values in zip(channels, samples, strict=True)
        },
    }
