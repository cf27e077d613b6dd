"""What is done to a crop so that a network must restore it: paint, shuffled voxels, turns, noise.

Drawn on the CPU as plain data, so that no GPU is waited for, then applied to a batch on its own device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SPACE = (2, 3, 4)
Box = tuple[slice, slice, slice]
Size = Sequence[int]


def generator_of_step() -> torch.Generator:
    """A CPU generator that begins with the seed that the loop gave to this step: it corrupts alike again."""
    return torch.Generator().manual_seed(torch.initial_seed())


def draw_seed(generator: torch.Generator) -> int:
    """A seed for the noise that a device draws for itself."""
    return int(torch.randint(2**31, (1,), generator=generator))


def draw_boxes(
    generator: torch.Generator,
    count: int,
    size: Size,
    sides: tuple[float, float],
    *,
    growing: bool = False,
) -> list[Box]:
    """`count` boxes that lie within `size`, their sides drawn for each axis from a range of shares of it.

    growing: each box is at least as long as the one before it. MONAI's RandCoarseDropout overwrites the least
    side with each one drawn, so that the last of six boxes is nearly always of the greatest.
    """
    least, most = ([max(round(share * extent), 1) for extent in size] for share in sides)
    boxes = []
    for numbers in torch.rand(count, 2, 3, generator=generator, dtype=torch.float64).tolist():
        side = [low + int(u * (high - low + 1)) for u, low, high in zip(numbers[0], least, most, strict=True)]
        start = [int(u * (extent - edge + 1)) for u, extent, edge in zip(numbers[1], size, side, strict=True)]
        boxes.append(_box(start, side))
        least = side if growing else least
    return boxes


def _box(start: Size, side: Size) -> Box:
    x, y, z = (slice(first, first + extent) for first, extent in zip(start, side, strict=True))
    return x, y, z


def painted(boxes: Sequence[Box], size: Size) -> np.ndarray:
    """(x, y, z): the number of the box, from 1, that was painted last over a voxel; 0 for none."""
    owner = np.zeros(size, np.int16)
    for number, box in enumerate(boxes, start=1):
        owner[box] = number
    return owner


@dataclass(frozen=True)
class Painting:
    """Noise in the boxes of each crop, or, where `outside`, everywhere but in them."""

    boxes: tuple[list[Box], ...]
    outside: tuple[bool, ...]
    seed: int


def paint(painting: Painting, image: Tensor) -> Tensor:
    """Noise, uniform between the crop's least and greatest value, over a part of each; (b, c, x, y, z).

    In-painting and out-painting of the published pre-training of ViTs. Oracle: MONAI's RandCoarseDropout.
    """
    size = image.shape[2:]
    masks = np.stack([painted(boxes, size) > 0 for boxes in painting.boxes])
    masks ^= np.array(painting.outside)[:, None, None, None]
    mask = torch.from_numpy(masks).to(image.device, non_blocking=True)[:, None]
    least, most = (f(image, dim=(1, *SPACE), keepdim=True) for f in (torch.amin, torch.amax))
    generator = torch.Generator(image.device).manual_seed(painting.seed)
    noise = torch.rand(image.shape, generator=generator, device=image.device, dtype=image.dtype)
    return torch.where(mask, noise.mul_(most - least).add_(least), image)


def shuffle(boxes: Sequence[Sequence[Box]], seed: int, image: Tensor) -> Tensor:
    """The voxels in each box change places, box after box, each channel by itself; (b, c, x, y, z).

    boxes: of each crop. Local shuffling; oracle: MONAI's RandCoarseShuffle.
    """
    image = image.clone(memory_format=torch.contiguous_format)
    generator = torch.Generator(image.device).manual_seed(seed)
    for crop, own in zip(image, boxes, strict=True):
        for box in own:
            part = crop[(slice(None), *box)]
            values = part.flatten(1)  # c n
            order = torch.rand(values.shape, generator=generator, device=image.device).argsort(1)
            part.copy_(values.gather(1, order).view(part.shape))
    return image


def draw_turns(generator: torch.Generator, count: int, size: Size, axis: int) -> list[int]:
    """Quarter turns about a spatial axis, 0 to 3 for each of `count` crops; only 0 and 2 fit a long side."""
    one, other = (extent for place, extent in enumerate(size) if place != axis)
    turns = (0, 1, 2, 3) if one == other else (0, 2)
    return [turns[k] for k in torch.randint(len(turns), (count,), generator=generator).tolist()]


def turn(turns: Sequence[int], axis: int, image: Tensor) -> Tensor:
    """Each crop of (b, c, x, y, z) turned about a spatial axis by its number of quarters."""
    one, other = (place + 1 for place in range(3) if place != axis)
    return torch.stack([crop.rot90(k, (one, other)) for crop, k in zip(image, turns, strict=True)])


def add_noise(deviation: float, seed: int, image: Tensor) -> Tensor:
    """Gaussian noise of one standard deviation, whatever the image's own; (b, c, x, y, z)."""
    generator = torch.Generator(image.device).manual_seed(seed)
    noise = torch.randn(image.shape, generator=generator, device=image.device, dtype=image.dtype)
    return noise.mul_(deviation).add_(image)


def coarsen(factor: int, image: Tensor) -> Tensor:
    """Every `factor`-th voxel along each axis, spread over its neighbours up to the next; (b, c, x, y, z)."""
    x, y, z = image.shape[2:]
    kept = image[:, :, ::factor, ::factor, ::factor]
    return F.interpolate(kept, scale_factor=float(factor))[:, :, :x, :y, :z]
