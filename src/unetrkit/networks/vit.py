"""The vision transformer that encodes for UNETR.

Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf, prod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unetrkit.errors import UserError
from unetrkit.networks.blocks import Mlp, check_rate, pad_to_multiple, run

PATCHES = (2, 4, 8, 16, 32)


@dataclass(frozen=True, kw_only=True)
class ViTSize:
    """How large a vision transformer is, how it is run and when it hands out maps; as it stands, ViT-B/16.

    * depth, width, heads: the blocks, the channels of a token, the attention heads that share them
    * mlp_ratio: the channels inside each block's MLP, as a multiple of `width`
    * patch: the edge in voxels of the cube that becomes a token, one of `PATCHES`
    * taps: the blocks, counted from 0, whose tokens are handed out too: one for each level between the image
      and the patches, log2(patch) - 1. None given: evenly spaced, 3, 6, 9 of 12 and 2, 4, 6 of 8.
    * patch_embedding: how the embedding begins, see `PatchEmbedding`
    * dropout: of the embedded tokens, and in attention and MLP
    * checkpointing: compute activations twice instead of keeping them

    Raises UserError: sizes that are none, or that do not fit each other.

    >>> ViTSize(depth=8, width=512, heads=8).tapped
    (2, 4, 6)
    """

    depth: int = 12
    width: int = 768
    heads: int = 12
    mlp_ratio: float = 4.0
    patch: int = 16
    taps: tuple[int, ...] = ()
    patch_embedding: Literal["conv", "perceptron"] = "conv"
    dropout: float = 0.0
    checkpointing: bool = False

    def __post_init__(self) -> None:
        for option in ("depth", "width", "heads"):
            if getattr(self, option) < 1:
                raise UserError(f"`{option}` is {getattr(self, option)}", hint="1 or more is needed")
        if self.width % self.heads:
            hint = f"`width` is {self.width}, and each head takes an equal share of it"
            raise UserError(f"`heads` is {self.heads}", hint=hint)
        if not 1 <= self.width * self.mlp_ratio < inf:
            hint = "the MLP has so many channels for each of a token's: 4 is usual"
            raise UserError(f"`mlp_ratio` is {self.mlp_ratio}", hint=hint)
        if self.patch not in PATCHES:
            raise UserError(f"`patch` is {self.patch}", hint=f"one of {list(PATCHES)} is needed")
        if self.depth < self.count:
            hint = f"{self.count} or more are needed, for a `patch` of {self.patch} takes {self.count} `taps`"
            raise UserError(f"`depth` is {self.depth}", hint=hint)
        rising = all(before < after for before, after in pairwise((-1, *self.tapped, self.depth)))
        if len(self.tapped) != self.count or not rising:
            numbers = f"{self.count} rising block numbers from 0 to {self.depth - 1}"
            raise UserError(f"`taps` is {list(self.taps)}", hint=f"{numbers} are needed, as in {self.even()}")
        check_rate("dropout", self.dropout)

    @property
    def count(self) -> int:
        """How many taps the patch needs."""
        return self.patch.bit_length() - 2

    @property
    def hidden(self) -> int:
        """Channels inside each block's MLP."""
        return round(self.width * self.mlp_ratio)

    @property
    def tapped(self) -> tuple[int, ...]:
        """The blocks that are tapped."""
        # UNETR's paper says the 3rd, 6th and 9th block; its code, and so everyone's weights, takes index 3, 6
        # and 9 counted from 0: the 4th, 7th and 10th. Even spacing gives the same at depth 12.
        return self.taps or tuple(self.even())

    def even(self) -> list[int]:
        """The evenly spaced taps."""
        return [tap * self.depth // (self.count + 1) for tap in range(1, self.count + 1)]


def resized(position: Tensor, source: tuple[int, ...], target: tuple[int, ...]) -> Tensor:
    """Position embeddings (1, n, dim), learned on the grid of patches `source`, for another grid."""
    if source == target:
        return position
    learned = position.transpose(1, 2).unflatten(2, source)  # 1 c x y z
    return F.interpolate(learned, target, mode="trilinear").flatten(2).transpose(1, 2)


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
    """Image (b, c, x, y, z) -> maps (b, width, x/p, y/p, z/p): after each tapped block, then after the last.

    Any size: the image is padded with zeros to a multiple of the patch p, and position embeddings, learned on
    `image_size`'s grid of patches, are interpolated to the image's grid. Only the last map is normed. The
    network that owns it must `initialise` it: position embeddings start at 0 here.

    * image_size: the size that it will mostly see, in voxels.
    * stem: what the image passes first, on its way to the patches: the same channels on the same grid.
    """

    def __init__(
        self, in_channels: int, image_size: Sequence[int], size: ViTSize, *, stem: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.size = size
        self.grid = self.grid_of(image_size)
        self.channels = (size.width,) * (len(size.tapped) + 1)
        self.checkpointing = size.checkpointing
        self.stem = stem
        self.embedding = PatchEmbedding(in_channels, size.width, size.patch, size.patch_embedding)
        self.position = nn.Parameter(torch.zeros(1, prod(self.grid), size.width))
        blocks = (Block(size.width, size.heads, size.hidden, size.dropout) for _ in range(size.depth))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(size.width)

    def reset(self) -> None:
        nn.init.trunc_normal_(self.position, std=0.02)

    def grid_of(self, image_size: Sequence[int]) -> tuple[int, ...]:
        """How many patches cover an image along each axis."""
        return tuple(-(-extent // self.size.patch) for extent in image_size)

    def positions(self, grid: tuple[int, ...]) -> Tensor:
        """Position embeddings for a grid of patches, (1, n, width)."""
        return resized(self.position, self.grid, grid)

    def embed(self, image: Tensor) -> Tensor:
        """The image's patches as tokens that know their place, (b, n, width), z fastest."""
        if self.stem is not None:
            image = run(self.stem, image, checkpointing=self.checkpointing)
        tokens = self.embedding(image)  # b x y z c
        placed = tokens.flatten(1, 3) + self.positions(tuple(tokens.shape[1:4]))
        return F.dropout(placed, self.size.dropout, self.training)  # b n c

    def encode(self, tokens: Tensor) -> list[Tensor]:
        """Embedded tokens (b, n, width) -> tokens after each tapped block, then after the last, normed.

        They carry their place, so that a masked autoencoder encodes the visible ones alone, in any order:
        `encode(embed(image)[:, visible])`.
        """
        outputs = []
        for index, block in enumerate(self.blocks):
            tokens = run(block, tokens, checkpointing=self.checkpointing)
            if index in self.size.tapped:
                outputs.append(tokens)
        return [*outputs, self.norm(tokens)]

    def forward(self, image: Tensor) -> list[Tensor]:
        grid = self.grid_of(image.shape[2:])
        # in this order, else torch does not see of a single image that it is channels last
        return [x.unflatten(1, grid).movedim(-1, 1) for x in self.encode(self.embed(image))]  # b c x y z
