"""What is done to a training patch: drawn once as plain data, then applied to image and label alike."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from unetrkit.data.augment_intensity import INTENSITY
from unetrkit.data.augment_spatial import (
    Orientation,
    Warp,
    apply_orientation,
    apply_warp,
    draw_orientation,
    warp_matrix,
)
from unetrkit.data.plan import Positive, Settings

Probability = Annotated[float, Field(ge=0, le=1)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Range = tuple[Positive, Positive]


class AugmentSettings(Settings):
    """Which augmentations, how often, how much.

    `default` is the published set of UNETR and Swin UNETR: flips, quarter turns, intensity scale and shift.
    `strong` adds the rest, with the probabilities and ranges that nnU-Net publishes unless a comment says
    otherwise.

    >>> AugmentSettings(set="strong", p_gamma=0.1).gamma
    (0.7, 1.5)
    """

    set: Literal["none", "default", "strong"] = "default"

    p_flip: Probability = 0.2  # of each axis; nnU-Net: 0.5
    p_rot90: Probability = 0.2
    p_scale: Probability = 0.1
    scale: Amount = 0.1  # values times 1 ± scale; nnU-Net: 0.25 with probability 0.15
    p_shift: Probability = 0.1
    shift: Amount = 0.1  # values ± shift

    p_rotate: Probability = 0.2
    rotate_degrees: Annotated[float, Field(ge=0, le=180)] = 30.0  # about each axis
    p_zoom: Probability = 0.2
    zoom: Range = (0.7, 1.4)
    p_elastic: Probability = 0.2  # nnU-Net 1; nnU-Net 2 has none
    elastic_mm: Amount = 4.0  # ours: largest standard deviation of the displacements
    p_noise: Probability = 0.1
    noise: Amount = 0.3  # standard deviations of the patch, at most; nnU-Net: variance 0.1
    p_blur: Probability = 0.2
    blur: Range = (0.5, 1.0)  # voxels
    p_contrast: Probability = 0.15
    contrast: Range = (0.75, 1.25)
    p_low_resolution: Probability = 0.25
    low_resolution: Range = (0.5, 1.0)
    p_gamma: Probability = 0.3
    gamma: Range = (0.7, 1.5)


@dataclass(frozen=True)
class Augmentation:
    """One draw: all that happens to one patch, its image and its label."""

    orientation: Orientation
    warp: Warp | None = None
    # (name in INTENSITY, amount), in order
    changes: tuple[tuple[str, float], ...] = ()
    seed: int = 0


def draw_augmentation(
    generator: torch.Generator,
    settings: AugmentSettings,
    size: tuple[int, int, int],
    spacing: tuple[float, float, float],
) -> Augmentation:
    """Draw what happens to a patch of `size` voxels of `spacing` mm."""
    if settings.set == "none":
        return Augmentation(Orientation())
    orientation = draw_orientation(generator, settings.p_flip, settings.p_rot90, size)
    seed = int(torch.randint(2**31, (1,), generator=generator))
    warp = _draw_warp(generator, settings, spacing, seed) if settings.set == "strong" else None
    return Augmentation(orientation, warp, _draw_changes(generator, settings), seed)


def apply_spatial(augmentation: Augmentation, image: Tensor) -> Tensor:
    """Image (..., x, y, z) -> the same shape and type; possibly a view of `image`."""
    image = apply_orientation(augmentation.orientation, image)
    return image if augmentation.warp is None else apply_warp(augmentation.warp, image, "bilinear")


def apply_intensity(augmentation: Augmentation, image: Tensor) -> Tensor:
    """Image (..., x, y, z), floating -> the same; `image` itself where nothing was drawn."""
    for name, amount in augmentation.changes:
        image = INTENSITY[name](image, amount, augmentation.seed)
    return image


def apply_label(augmentation: Augmentation, label: Tensor, mirrored: Sequence[int] = ()) -> Tensor:
    """Label (..., x, y, z) of class indices -> the same shape and type; possibly a view of `label`.

    `mirrored` (`Plan.mirrored`): an odd number of flips makes a mirror image, in which left and right organs
    have changed places, so that they exchange their classes; quarter turns and an even number of flips are
    rotations, which keep every name.
    """
    label = apply_orientation(augmentation.orientation, label)
    if augmentation.warp is not None:
        label = apply_warp(augmentation.warp, label, "nearest")
    if sum(augmentation.orientation.flips) % 2 and list(mirrored) != sorted(mirrored):
        label = torch.tensor(mirrored, dtype=label.dtype, device=label.device)[label.int()]
    return label


def _draw_warp(
    generator: torch.Generator, settings: AugmentSettings, spacing: tuple[float, float, float], seed: int
) -> Warp | None:
    rotate, zoom, elastic, size, amount, *turns = torch.rand(8, generator=generator).tolist()
    if rotate >= settings.p_rotate and zoom >= settings.p_zoom and elastic >= settings.p_elastic:
        return None
    most = math.radians(settings.rotate_degrees) if rotate < settings.p_rotate else 0.0
    x, y, z = (most * (2 * u - 1) for u in turns)
    magnification = _between(size, settings.zoom) if zoom < settings.p_zoom else 1.0
    millimetres = settings.elastic_mm * amount if elastic < settings.p_elastic else 0.0
    dx, dy, dz = (millimetres / s for s in spacing)
    return Warp(warp_matrix((x, y, z), magnification, spacing), (dx, dy, dz), seed)


def _draw_changes(generator: torch.Generator, settings: AugmentSettings) -> tuple[tuple[str, float], ...]:
    # the order of the table: that of nnU-Net's pipeline
    names = [name for name in INTENSITY if settings.set == "strong" or name in ("scale", "shift")]
    bounds = {name: getattr(settings, name) for name in names}
    bounds |= {"scale": (-settings.scale, settings.scale), "shift": (-settings.shift, settings.shift)}
    bounds["noise"] = 0.0, settings.noise
    chances = torch.rand(len(names), 2, generator=generator).tolist()
    return tuple(
        (name, _between(u, bounds[name]))
        for name, (chance, u) in zip(names, chances, strict=True)
        if chance < getattr(settings, f"p_{name}")
    )


def _between(u: float, bounds: tuple[float, float]) -> float:
    return bounds[0] + u * (bounds[1] - bounds[0])
