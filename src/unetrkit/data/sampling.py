"""Which case and which patch a training step sees: a function of the seed and the step, never of the process.

The distribution of patches is that of the published recipe (MONAI's RandCropByPosNegLabel, one foreground
centre to one background centre).
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from unetrkit.data.chunks import Triple
from unetrkit.data.plan import PATCH_SIZE, Extent, Intensity, Settings
from unetrkit.data.store import StoredCase


class SamplingSettings(Settings):
    """How a batch is drawn from the cases.

    The published UNETR recipe is ``batch_size=4, patches_per_case=4``: four patches of one case a step.

    >>> SamplingSettings(batch_size=4, patches_per_case=4).foreground
    0.5
    """

    # what is cut; None: the plan's
    patch_size: Annotated[tuple[Extent, Extent, Extent] | None, Field(description=PATCH_SIZE)] = None
    # what the network sees: a patch is interpolated to it, its label by the nearest voxel; None: the patch
    network_size: Annotated[
        tuple[Extent, Extent, Extent] | None, Field(description=PATCH_SIZE.replace("patch", "network"))
    ] = None
    # patches in a batch, on each rank
    batch_size: Annotated[int, Field(ge=1)] = 2
    # consecutive patches that come from one case, so that its chunks are read while they are warm
    patches_per_case: Annotated[int, Field(ge=1)] = 1
    # probability that a patch is centred on a foreground voxel
    foreground: Annotated[float, Field(ge=0, le=1)] = 0.5
    # the class of a foreground centre: uniform among the classes of the case, instead of by voxel count
    class_balanced: bool = False
    # a case that cannot be read: the next takes its place, which is said, instead of an error
    skip_broken: bool = False


def generator_for(seed: int, *counters: int) -> torch.Generator:
    """A CPU generator that depends only on its arguments, such as (seed, step, rank, index).

    Counters of different number or order give unrelated streams. torch keeps 32 bits of a seed: two patches
    share a stream once in 4e9 pairs, and then on different cases or steps.

    >>> generator_for(0, 7, 1).initial_seed() == generator_for(0, 7, 1).initial_seed()
    True
    """
    digest = hashlib.blake2b(repr((seed, *counters)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def case_at(seed: int, position: int, cases: int) -> int:
    """The case at a position of the endless sequence of shuffled passes; a pass holds every case once.

    >>> sorted(case_at(0, position, 4) for position in range(4, 8))
    [0, 1, 2, 3]
    """
    return _shuffled(seed, position // cases, cases)[position % cases]


@lru_cache(maxsize=32)
def _shuffled(seed: int, number: int, cases: int) -> list[int]:
    return torch.randperm(cases, generator=generator_for(seed, number)).tolist()


def draw_corner(
    generator: torch.Generator, case: StoredCase, size: Triple, settings: SamplingSettings
) -> Triple:
    """First voxel of a patch: a foreground or background centre minus half the size, moved inside the volume.

    A case without foreground gives background centres, and one without background foreground centres.
    Along an axis shorter than the patch the volume is centred in it, and the corner is negative (or 0).
    """
    centres = case.centres(_draw_class(generator, case.counts, settings))
    n = int(torch.randint(len(centres), (1,), generator=generator))
    return corner_around(centres[n], size, case.shape)


def corner_around(centre: Sequence[int], size: Triple, shape: Triple) -> Triple:
    """First voxel of a patch around a voxel, moved inside the volume as `draw_corner` describes.

    >>> corner_around((2, 15, 4), (8, 8, 16), (20, 20, 10))
    (0, 11, -3)
    """
    x, y, z = (
        min(max(int(c) - s // 2, 0), n - s) if n >= s else -((s - n) // 2)
        for c, s, n in zip(centre, size, shape, strict=True)
    )
    return x, y, z


def _draw_class(generator: torch.Generator, counts: tuple[int, ...], settings: SamplingSettings) -> int:
    """Class index of the centre."""
    side, which = torch.rand(2, generator=generator).tolist()
    weights = [min(n, 1) if settings.class_balanced else n for n in counts]
    weights[0] = 0
    total = sum(weights)
    if total == 0 or (counts[0] > 0 and side >= settings.foreground):
        return 0
    return next(k for k, sum_ in enumerate(accumulate(weights)) if sum_ > which * total)


def read_patch(
    case: StoredCase, corner: Triple, size: Triple, intensity: tuple[Intensity, ...]
) -> tuple[Tensor, Tensor]:
    """`read_image_patch` and the label (*size) uint8 of the same voxels, 0 outside the volume."""
    start, inside, widths = _inside(case.shape, corner, size)
    label = case.label(start, inside)
    label = np.pad(label, widths) if inside != size else label
    return read_image_patch(case, corner, size, intensity), torch.from_numpy(label)


def read_image_patch(
    case: StoredCase, corner: Triple, size: Triple, intensity: tuple[Intensity, ...]
) -> Tensor:
    """Image (c, *size) in the store's floating type, from the chunks it needs only.

    What lies outside the volume is air: 0 for a `window` channel (its lower bound), and the least value read
    for a `zscore` channel, which has no value that means air.
    """
    start, inside, widths = _inside(case.shape, corner, size)
    image = case.image(start, inside)
    if inside != size:
        air = [0 if i.kind == "window" else c.min() for c, i in zip(image, intensity, strict=True)]
        image = np.stack([np.pad(c, widths, constant_values=a) for c, a in zip(image, air, strict=True)])
    return torch.from_numpy(image)


def _inside(shape: Triple, corner: Triple, size: Triple) -> tuple[Triple, Triple, list[tuple[int, int]]]:
    """Of a patch the part inside the volume: first voxel, size, and what is missing before and after."""
    start = [max(c, 0) for c in corner]
    stop = [min(c + s, n) for c, s, n in zip(corner, size, shape, strict=True)]
    widths = [(a - c, c + s - b) for c, s, a, b in zip(corner, size, start, stop, strict=True)]
    x, y, z = (b - a for a, b in zip(start, stop, strict=True))
    return (start[0], start[1], start[2]), (x, y, z), widths
