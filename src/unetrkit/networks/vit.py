"""The vision transformer that encodes for UNETR.

Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929
"""

from __future__ import annotations

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unetrkit.networks.blocks import Mlp, pad_to_multiple, run


class PatchEmbedding(nn.Linear):
    """Image (b, c, x, y, z) -> tokens (b, x/p, y/p, z/p, dim), one for each cube of p voxels.

    The published variants, "conv" and "perceptron", are the same linear map, and so they are here: the values
    in a cube, in the order (c, x, y, z), times one matrix. They only start differently, see `initialise`.
    """

    def __init__(self, in_channels: int, dim: int, patch: int, start: str) -> None:
        super().__init__(in_channels * patch**3, dim)
        self.patch = patch
        self.start = start

    def reset(self) -> None:
        if self.start == "conv":
            self.reset_parameters()  # a Linear's own is a convolution's own

    def forward(self, image: Tensor) -> Tensor:
        p = self.patch
        image = pad_to_multiple(image, p)
        b, c, *size = image.shape
        x, y, z = (extent // p for extent in size)
        cubes = image.reshape(b, c, x, p, y, p, z, p).permute(0, 2, 4, 6, 1, 3, 5, 7)  # b x y z c p p p
        return super().forward(cubes.flatten(4))  # b x y z dim


class Attention(nn.Module):
    """Every token of (b, n, c) attends to every token."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)  # b h n d
        # eval() does not switch off dropout_p
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return F.dropout(self.proj(x.transpose(1, 2).reshape(b, n, c)), self.dropout, self.training)


class Block(nn.Module):
    """Attention and MLP, each on the normed tokens and added to them; (b, n, c)."""

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads, dropout)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, hidden, dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Image (b, c, x, y, z) -> maps (b, dim, x/16, y/16, z/16): after each block of `taps`, then the last.

    Any size: the image is padded with zeros to a multiple of the patch, and position embeddings, learned on
    `image_size`'s grid of patches, are interpolated to the image's grid. Only the last map is normed.
    """

    patch = 16
    dim = 768
    depth = 12
    heads = 12

    def __init__(
        self,
        in_channels: int,
        image_size: tuple[int, int, int],
        *,
        patch_embedding: str = "conv",
        taps: tuple[int, ...] = (3, 6, 9),
        dropout: float = 0.0,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.grid = tuple(-(-size // self.patch) for size in image_size)
        self.taps = taps
        self.channels = (self.dim,) * (len(taps) + 1)
        self.dropout = dropout
        self.checkpointing = checkpointing
        self.embedding = PatchEmbedding(in_channels, self.dim, self.patch, patch_embedding)
        self.position = nn.Parameter(torch.empty(1, prod(self.grid), self.dim))
        blocks = (Block(self.dim, self.heads, 4 * self.dim, dropout) for _ in range(self.depth))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(self.dim)

    def reset(self) -> None:
        nn.init.trunc_normal_(self.position, std=0.02)

    def positions(self, grid: tuple[int, ...]) -> Tensor:
        """Position embeddings for a grid of patches, (1, n, dim)."""
        if grid == self.grid:
            return self.position
        learned = self.position.transpose(1, 2).unflatten(2, self.grid)  # 1 c x y z
        return F.interpolate(learned, grid, mode="trilinear").flatten(2).transpose(1, 2)

    def forward(self, image: Tensor) -> list[Tensor]:
        tokens = self.embedding(image)  # b x y z c
        grid = tuple(tokens.shape[1:4])
        x = F.dropout(tokens.flatten(1, 3) + self.positions(grid), self.dropout, self.training)  # b n c
        maps = []
        for index, block in enumerate(self.blocks):
            x = run(block, x, checkpointing=self.checkpointing)
            if index in self.taps:
                maps.append(x)
        maps.append(self.norm(x))
        return [x.transpose(1, 2).unflatten(2, grid) for x in maps]  # b c x y z
