"""Which parts of a crop are hidden, drawn exactly, and what patches mean in voxels."""

from collections.abc import Sequence

import torch
from torch import Tensor

from unetrkit.networks.blocks import pad_to_multiple


def draw_hidden(generator: torch.Generator, count: int, parts: int, share: float) -> Tensor:
    """(count, parts), true where hidden: of each row exactly a share, rounded down, but of two at least one.

    >>> draw_hidden(torch.Generator().manual_seed(0), 3, 48, 0.6).sum(1)
    tensor([28, 28, 28])
    """
    hidden = max(int(share * parts), min(1, parts - 1))
    order = torch.rand(count, parts, generator=generator).argsort(1)
    return torch.zeros(count, parts, dtype=torch.bool).scatter(1, order[:, :hidden], True)


def in_voxels(patches: Tensor, patch: int, size: Sequence[int]) -> Tensor:
    """A value for each patch, (b, c, i, j, k), as one for each of its voxels, (b, c, x, y, z)."""
    x, y, z = size
    for axis in (2, 3, 4):
        patches = patches.repeat_interleave(patch, axis)
    return patches[:, :, :x, :y, :z]


def normalised(image: Tensor, patch: int) -> tuple[Tensor, Tensor, Tensor]:
    """(b, c, x, y, z) with each patch at mean 0 and variance 1; that mean and deviation, (b, 1, x, y, z).

    Over all channels of a patch, as published; of a patch that the image ends in, over the voxels it has.
    """
    size = image.shape[2:]

    def total(values: Tensor) -> Tensor:
        cubes = pad_to_multiple(values.sum(1, keepdim=True), patch)
        for axis in (2, 3, 4):
            cubes = cubes.unfold(axis, patch, patch)
        return in_voxels(cubes.sum((5, 6, 7)), patch, size)

    count = total(torch.ones_like(image))
    mean = total(image) / count
    variance = total((image - mean).square()) / (count - 1).clamp_min(1)
    deviation = (variance + 1e-6).sqrt()
    return (image - mean) / deviation, mean, deviation
