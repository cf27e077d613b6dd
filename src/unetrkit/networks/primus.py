"""Primus: a plain vision transformer that segments by itself, with small tokens and hardly a decoder.

Wald et al. 2025, https://arxiv.org/abs/2503.01835; its blocks are EVA-02's, Fang et al. 2023,
https://arxiv.org/abs/2303.11331; rotary positions: Su et al. 2021, https://arxiv.org/abs/2104.09864
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import prod, sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unetrkit.errors import UserError
from unetrkit.networks.blocks import DropPath, check_rate, initialise, run
from unetrkit.networks.unetr import takes
from unetrkit.networks.vit import PatchEmbedding, resized
from unetrkit.networks.windows import Size, remembered


@dataclass(frozen=True, kw_only=True)
class PrimusSize:
    """How large Primus is, and how it is run; as it stands, Primus-S.

    * width, depth, heads: the channels of a token, `heads` times a multiple of 6; the blocks; their heads
    * drop_path: probability that the last block is dropped in training; it rises from 0 at the first. The
      paper trains with 0.2.
    * checkpointing: compute activations twice instead of keeping them

    Raises UserError: sizes that are none, or that do not fit each other.
    """

    width: int = 396
    depth: int = 12
    heads: int = 6
    drop_path: float = 0.0
    checkpointing: bool = False

    def __post_init__(self) -> None:
        for option in ("depth", "heads"):
            if getattr(self, option) < 1:
                raise UserError(f"`{option}` is {getattr(self, option)}", hint="1 or more is needed")
        if self.width < 1 or self.width % (6 * self.heads):
            each = "six channels for each of `heads`, two for each axis"
            hint = f"a multiple of {6 * self.heads} is needed: {each}"
            raise UserError(f"`width` is {self.width}", hint=hint)
        check_rate("drop_path", self.drop_path)


def rotary(grid: Size, dim: int, device: torch.device) -> Tensor:
    """The angles by which `rotate` turns each token of a grid: cosines, sines (1, n, 2, dim/2), remembered.

    A third of the `dim` channels of a head turns with each axis, in pairs: pair i of the axis's dim / 6 by
    10000 ** (-i / (dim / 6)) radians per token. The table is a constant, so any grid has one.
    """
    return remembered(_rotary, grid, dim, device)


@lru_cache(maxsize=64)
def _rotary(grid: Size, dim: int, device: torch.device) -> Tensor:
    places = torch.cartesian_prod(*(torch.arange(extent) for extent in grid))  # n 3
    pairs = dim // 6
    speed = 10_000 ** (-torch.arange(pairs, dtype=torch.double) / pairs)
    angle = (places[:, :, None] * speed).flatten(1)  # n dim/2
    return torch.stack((angle.cos(), angle.sin()), dim=1)[None].to(device, torch.float)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Heads (b, n, h, d), each pair of channels turned by its token's angle; `table`: (1 or b, n, 2, d/2).

    What two tokens so turned have in common depends on how far apart they are, not on where they are.
    """
    first, second = x.unflatten(3, (-1, 2)).unbind(4)  # b n h d/2
    cos, sin = table[:, :, :, None].unbind(2)  # 1 n 1 d/2
    # in the table's precision also where x has half of it
    turned = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=4)
    return turned.flatten(3).to(x.dtype)


class Attention(nn.Module):
    """Every token of (b, n, c) attends to every token; queries and keys are turned, answers normed."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim, bias=False)
        self.v = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        head = (self.heads, x.shape[2] // self.heads)
        q, k, v = (linear(x).unflatten(2, head) for linear in (self.q, self.k, self.v))  # b n h d
        q, k, v = (t.transpose(1, 2) for t in (rotate(q, table), rotate(k, table), v))  # b h n d
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # b n c
        return self.proj(self.norm(x))


class SwiGLU(nn.Module):
    """Linear, times the SiLU of another linear, normed, linear: on the last axis.

    Shazeer 2020, https://arxiv.org/abs/2002.05202; with two thirds of an MLP's width it has an MLP's size.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = 8 * dim // 3
        self.gate = nn.Linear(dim, hidden)
        self.linear1 = nn.Linear(dim, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.linear2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.norm(F.silu(self.gate(x)) * self.linear1(x)))


class Block(nn.Module):
    """Attention and SwiGLU, each on the normed tokens, scaled per channel and added to them; (b, n, c)."""

    def __init__(self, dim: int, heads: int, *, number: int, drop_path: float) -> None:
        super().__init__()
        self.number = number
        self.keep = DropPath(drop_path)
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.scale1 = nn.Parameter(torch.full((dim,), 0.1))
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = SwiGLU(dim)
        self.scale2 = nn.Parameter(torch.full((dim,), 0.1))

    @torch.no_grad()
    def reset(self) -> None:
        # the deeper the block, the less it says at first
        for last in (self.attention.proj, self.mlp.linear2):
            last.weight /= sqrt(2 * self.number)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        x = x + self.keep(self.scale1 * self.attention(self.norm1(x), table))
        return x + self.keep(self.scale2 * self.mlp(self.norm2(x)))


class RotaryViT(nn.Module):
    """Image (b, c, x, y, z) -> one map (b, width, x/8, y/8, z/8), normed.

    Any size: the image is padded with zeros to a multiple of 8. Positions are rotary, and beside them learned
    on `image_size`'s grid of tokens and interpolated for other grids.

    A masked autoencoder needs the steps: `embed`, then for tokens `seen` (b, m) of each image
    `encode(tokens[batch, seen], table[0, seen])`, with `batch = torch.arange(b)[:, None]`.
    """

    patch = 8

    def __init__(self, in_channels: int, image_size: Size, size: PrimusSize) -> None:
        super().__init__()
        self.grid = tuple(-(-extent // self.patch) for extent in image_size)
        self.channels = (size.width,)
        self.head = size.width // size.heads
        self.checkpointing = size.checkpointing
        self.embedding = PatchEmbedding(in_channels, size.width, self.patch, "perceptron")
        self.position = nn.Parameter(torch.empty(1, prod(self.grid), size.width))
        rates = [size.drop_path * i / max(1, size.depth - 1) for i in range(size.depth)]
        blocks = (Block(size.width, size.heads, number=i + 1, drop_path=rate) for i, rate in enumerate(rates))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(size.width)

    def reset(self) -> None:
        nn.init.trunc_normal_(self.position, std=0.02)
        nn.init.kaiming_normal_(self.embedding.weight, a=0.01)

    def positions(self, grid: Size) -> Tensor:
        """Learned position embeddings for a grid of tokens, (1, n, width)."""
        return resized(self.position, self.grid, grid)

    def embed(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens of an image with their learned positions, (b, n, width), and their table of `rotary`."""
        cubes = self.embedding(image)  # b x y z c
        _, x, y, z, _ = cubes.shape
        tokens = cubes.flatten(1, 3) + self.positions((x, y, z))
        return tokens, rotary((x, y, z), self.head, image.device)

    def encode(self, tokens: Tensor, table: Tensor) -> Tensor:
        """All tokens, or some with their rows of the table, through the blocks; (b, n, width), normed."""
        for block in self.blocks:
            tokens = run(block, tokens, table, checkpointing=self.checkpointing)
        return self.norm(tokens)

    def forward(self, image: Tensor) -> list[Tensor]:
        grid = [-(-extent // self.patch) for extent in image.shape[2:]]
        return [self.encode(*self.embed(image)).transpose(1, 2).unflatten(2, grid)]  # b c x y z


class LightDecoder(nn.Module):
    """A map of tokens doubled three times, (b, width, x, y, z) -> logits (b, classes, 8x, 8y, 8z).

    Channels fall evenly, in proportion, towards twice the number of classes, in multiples of 8; they are
    normed between the steps. The last step is the head: it says the classes of 2 x 2 x 2 voxels.
    """

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        ratio = (2 * classes / width) ** (1 / 3)
        widths = [width, *(max(8, 8 * int(width * ratio**step / 8 + 0.5)) for step in (1, 2))]
        self.up = nn.ModuleList(nn.ConvTranspose3d(a, b, 2, stride=2) for a, b in pairwise(widths))
        self.norm = nn.ModuleList(nn.LayerNorm(fine, eps=1e-6) for fine in widths[1:])
        self.head = nn.ConvTranspose3d(widths[-1], classes, 2, stride=2)

    def reset(self) -> None:
        for step in (*self.up, self.head):
            nn.init.kaiming_normal_(step.weight, a=0.01)
            nn.init.zeros_(step.bias)

    def forward(self, x: Tensor) -> Tensor:
        for up, norm in zip(self.up, self.norm, strict=True):
            x = F.gelu(norm(up(x).movedim(1, -1)).movedim(-1, 1))
        return self.head(x)


class Primus(nn.Module):
    """Image (b, c, x, y, z) -> logits (b, classes, x, y, z), of any size."""

    def __init__(self, encoder: RotaryViT, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = LightDecoder(encoder.channels[0], classes)
        initialise(self)

    def forward(self, image: Tensor) -> Tensor:
        x, y, z = image.shape[2:]
        logits: Tensor = self.decoder(self.encoder(image)[-1])
        return logits[:, :, :x, :y, :z]


@takes(PrimusSize)
def primus(in_channels: int, classes: int, image_size: Size = (96, 96, 96), **size: Any) -> Primus:
    """Primus with tokens of 8 x 8 x 8 voxels: (b, in_channels, x, y, z) -> logits (b, classes, x, y, z).

    Any size of 1 or more. Attention is between all tokens: 12 x 12 x 12 of them at 96 x 96 x 96, and the
    square of their number costs time (memory only in proportion). As published but for two things: learned
    positions are interpolated to other grids than `image_size`'s, and images need not be multiples of 8.

    size: see `PrimusSize`. Raises UserError where it is none.
    """
    return Primus(RotaryViT(in_channels, image_size, PrimusSize(**size)), classes)
