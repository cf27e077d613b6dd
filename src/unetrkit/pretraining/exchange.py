"""Blocks of noise and blocks of other crops, up to 30 % of each: what Swin UNETR's pre-training restores.

Tang et al. 2022, https://arxiv.org/abs/2111.14791
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from unetrkit.pretraining.corruptions import Box, Size, draw_seed, painted


@dataclass(frozen=True)
class Exchange:
    """For each crop: the blocks of noise, from whom it takes over others (itself: from nobody), and which."""

    noise: tuple[list[Box], ...]
    partner: tuple[int, ...]
    taken: tuple[list[Box], ...]
    seed: int


def draw_exchange(generator: torch.Generator, count: int, size: Size, most: float) -> Exchange:
    """Draw for `count` crops what noise covers and what comes from another, each up to a share `most`."""
    partner = torch.randint(count, (count,), generator=generator).tolist()
    noise = tuple(_blocks(generator, size, most) for _ in range(count))
    taken = tuple(_blocks(generator, size, most) if k != i else [] for i, k in enumerate(partner))
    return Exchange(noise, tuple(partner), taken, draw_seed(generator))


def _blocks(generator: torch.Generator, size: Size, most: float) -> list[Box]:
    """Blocks until their voxels, where they overlap counted twice, reach a share drawn between 0 and `most`.

    A side is 5 to 25 % of the crop's; a block that begins near the far end is cut there. As published, but
    that a block of a small crop has at least one voxel: the published one is empty below 20, for ever.
    """
    least = [max(extent // 20, 1) for extent in size]
    spread = [max(extent // 4 - low, 1) for extent, low in zip(size, least, strict=True)]
    wanted = float(torch.rand(1, generator=generator)) * most * float(np.prod(size))
    blocks: list[Box] = []
    covered = 0
    while covered < wanted:
        for numbers in torch.rand(32, 2, 3, generator=generator, dtype=torch.float64).tolist():
            block = []
            for axis, extent in enumerate(size):
                start = int(numbers[0][axis] * max(extent - least[axis], 1))
                side = least[axis] + int(numbers[1][axis] * spread[axis])
                block.append(slice(start, min(start + side, extent)))
            x, y, z = block
            blocks.append((x, y, z))
            covered += (x.stop - x.start) * (y.stop - y.start) * (z.stop - z.start)
            if covered >= wanted:
                break
    return blocks


def exchange(drawn: Exchange, image: Tensor, *, clean: bool = True) -> Tensor:
    """Noise in each crop's blocks, then the same region of another crop in others; (b, c, x, y, z).

    clean: what comes from another crop is as it was; otherwise, as published, the crops are corrupted one
    after the other, and of those before it a crop takes over noise and what they took over themselves.
    """
    generator = torch.Generator(image.device).manual_seed(drawn.seed)
    result = image.clone(memory_format=torch.contiguous_format)
    source = image if clean else result
    parts = zip(drawn.noise, drawn.partner, drawn.taken, strict=True)
    for index, (noise, partner, taken) in enumerate(parts):
        _cover_with_noise(result[index], noise, generator)
        if taken:
            mask = torch.from_numpy(painted(taken, image.shape[2:]) > 0).to(image.device, non_blocking=True)
            torch.where(mask, source[partner], result[index], out=result[index])
    return result


def _cover_with_noise(crop: Tensor, blocks: list[Box], generator: torch.Generator) -> None:
    """Normal noise, what is seen of each block scaled to [0, 1], in place; (c, x, y, z)."""
    owner = painted(blocks, crop.shape[1:]).reshape(-1)
    where = np.flatnonzero(owner)
    voxels = torch.from_numpy(where).to(crop.device, non_blocking=True)  # n
    block = torch.from_numpy(owner[where].astype(np.int64)).to(crop.device, non_blocking=True)
    block = block.expand(len(crop), -1)  # c n
    noise = torch.randn(block.shape, generator=generator, device=crop.device, dtype=crop.dtype)
    extremes = noise.new_zeros(len(crop), len(blocks) + 1)
    least = extremes.scatter_reduce(1, block, noise, "amin", include_self=False)
    most = extremes.scatter_reduce(1, block, noise, "amax", include_self=False)
    extent = (most - least).clamp_min(1e-6)  # of a block of one voxel: 0 / 0
    crop.view(len(crop), -1)[:, voxels] = (noise - least.gather(1, block)) / extent.gather(1, block)
