"""What a data set is like, and the plan that follows from it.

The idea is nnU-Net's (https://doi.org/10.1038/s41592-020-01008-z), cut down to what a fixed network needs.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from unetrkit.data.datalist import Case, Dataset, cases_to_learn_from
from unetrkit.data.declared import is_ct
from unetrkit.data.geometry import Triple, spacing_of, to_ras, turn
from unetrkit.data.inspection import count_labels
from unetrkit.data.plan import Intensity, LabelClass, Plan
from unetrkit.data.prepare import read_case
from unetrkit.data.preprocess import foreground_box
from unetrkit.data.processes import Each, for_each, map_cases
from unetrkit.errors import UserError, many
from unetrkit.progress import Progress

Extent = tuple[float, float, float]  # mm

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
    counts: dict[int, int]  # voxels per label id; empty without a label
    samples: np.ndarray  # c n: values of foreground voxels; without a label of those that are not air
    like_ct: tuple[bool, ...]  # per channel: whole numbers from -500 or below


def make_plan(
    dataset: Dataset, *, workers: int | None = None, progress: Progress | None = None, each: Each = for_each
) -> Plan:
    """The plan of a data set, from every training and validation case, each read once.

    spacing: the median along each axis. intensity: where a channel is CT (declared so, or not declared and
    alike), a window between the percentiles 0.5 and 99.5 of all foreground voxels (without labels: of all
    that is not air), else a z-score.
    patch_size: `patch_size_for`. classes: the declared ones, else the values found; without labels none.
    mirror_pairs: `find_mirror_pairs`.
    Raises UserError for a case that cannot be read, and where labels have no voxel.
    """
    cases = cases_to_learn_from(dataset)
    labelled = cases[0].label is not None
    prints = map_cases(fingerprint, cases, workers, progress, each)
    channels = dataset.channels or tuple(f"channel {k}" for k in range(len(prints[0].samples)))
    for case, one in zip(cases, prints, strict=True):
        if len(one.samples) != len(channels):
            raise UserError(
                f"`{case.images[0]}` has {many(len(one.samples), 'channel')}, declared are {len(channels)}",
                hint="name every channel in `channel_names`, and give every case all of them",
            )
    counts = sum((Counter(one.counts) for one in prints), Counter())
    if labelled and not set(counts) - {0}:
        hint = "check that the labels are the drawn masks: `unetrkit check` counts their voxels"
        raise UserError(f"no voxel of `{dataset.name}` is labelled: there is nothing to learn", hint=hint)
    samples = np.concatenate([one.samples for one in prints], axis=1)
    declared = [is_ct(name) for name in channels]
    ct = [all(one.like_ct[k] for one in prints) if says is None else says for k, says in enumerate(declared)]
    x, y, z = (float(f"{mm:.6g}") for mm in np.median([one.spacing for one in prints], axis=0))
    extent = np.median([one.body_box if all(ct) else one.relative_box for one in prints], axis=0).tolist()
    names = {0: "background"} | (dataset.labels or {k: f"class {k}" for k in counts if k != 0})
    names, voxels = names if labelled else {}, sum(counts.values())
    return Plan(
        dataset=dataset.name,
        channels=channels,
        classes=tuple(LabelClass(id=k, name=names[k]) for k in sorted(names)),
        spacing=(x, y, z),
        intensity=tuple(_window(values) if ct[k] else RELATIVE for k, values in enumerate(samples)),
        patch_size=patch_size_for(extent, (x, y, z)),
        mirror_pairs=find_mirror_pairs(names),
        statistics={
            "cases": len(prints),
            "shape (smallest, median, largest)": _spread([one.shape for one in prints]),
            "spacing (smallest, median, largest)": _spread([one.spacing for one in prints]),
            "share of voxels": {names[k]: float(f"{counts[k] / voxels:.3g}") for k in sorted(names)},
        },
    )


def _spread(rows: Sequence[Sequence[float]]) -> list[list[float]]:
    return np.percentile(rows, (0, 50, 100), axis=0).round(4).tolist()


def fingerprint(case: Case) -> Fingerprint:
    """Reads one case."""
    image, label = read_case(case)
    upright, axes, flips = to_ras(image)
    shape, spacing = upright.array.shape[1:], spacing_of(upright.affine)
    if label is None:
        body = (upright.array > BODY.lower).any(axis=0)
        foreground = np.flatnonzero(body if body.any() else ~body)
    else:
        label = turn(label[0], axes, flips)
        foreground = np.flatnonzero(label)
    if len(foreground) > SAMPLES:
        foreground = np.random.default_rng(0).choice(foreground, SAMPLES, replace=False, shuffle=False)
    return Fingerprint(
        shape=shape,
        spacing=spacing,
        body_box=_extent(upright.array, BODY, spacing),
        relative_box=_extent(upright.array, RELATIVE, spacing),
        counts={} if label is None else count_labels(label),
        samples=np.stack([channel[np.unravel_index(foreground, shape)] for channel in upright.array]),
        like_ct=tuple(bool(c.min() <= -500 and (c == np.rint(c)).all()) for c in image.array),
    )


def _extent(array: np.ndarray, something: Intensity, spacing: Sequence[float]) -> Extent:
    """The foreground box in mm."""
    box = foreground_box(array, (something,) * len(array))
    x, y, z = ((stop - start) * mm for (start, stop), mm in zip(box, spacing, strict=True))
    return x, y, z


def _window(values: np.ndarray) -> Intensity:
    """Whole HU; a scale of its own (values in [0, 1], say) keeps four digits."""
    lower, upper = (float(value) for value in np.percentile(values, PERCENTILES))
    if upper - lower >= 50:
        lower, upper = float(np.floor(lower)), float(np.ceil(upper))
    else:
        lower, upper = float(f"{lower:.4g}"), float(f"{upper:.4g}")
    return Intensity(kind="window", lower=lower, upper=upper if upper > lower else lower + 1)


def patch_size_for(extent: Sequence[float], spacing: Sequence[float]) -> Triple:
    """The patch for a foreground of `extent` mm: all of it where that is small enough.

    Each axis is the extent in voxels, rounded up to a multiple of 16 within 32 and 160; then the axis that is
    longest in mm loses 16 voxels until the patch has no more than 96 x 96 x 96.

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
    pattern = r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+"
    words = {k: tuple(word.lower() for word in re.findall(pattern, name)) for k, name in names.items()}
    often = Counter(words.values())
    known = {found: k for k, found in words.items() if often[found] == 1}
    pairs = set()
    for found, k in known.items():
        if HEART & set(found) or ("ventricle" in found and set(found) <= {*SIDES, "ventricle"}):
            continue
        other = known.get(tuple(SIDES.get(word, word) for word in found), k)
        if other == k and len(found) == 1 and found[0][:1] in {"l", "r"}:
            other = known.get((SIDES[found[0][0]] + found[0][1:],), k)
        if other != k:
            pairs.add((min(k, other), max(k, other)))
    return tuple(sorted(pairs))
