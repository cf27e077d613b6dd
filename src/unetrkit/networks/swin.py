"""The Swin transformer in 3D: attention within shifted windows.

Liu et al. 2021, https://arxiv.org/abs/2103.14030
"""

from typing import Literal, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unetrkit.errors import UserError
from unetrkit.networks.blocks import DropPath, Mlp, ResidualBlock, check_rate, pad_to_multiple, run
from unetrkit.networks.windows import Windows, attend, relative_index, windows

# the corners of a cube of 2 x 2 x 2 tokens, in the order in which `PatchMerging` joins their channels
CORNERS = {
    "full": ("000", "100", "010", "001", "110", "101", "011", "111"),
    # MONAI before 1.5, and with it every published Swin UNETR, read two corners twice and 110 and 011 never.
    # Such weights load into either without a word; with the wrong one the encoder's maps are 30 % off.
    "published": ("000", "100", "010", "001", "101", "010", "001", "111"),
}


class SwinOptions(TypedDict, total=False):
    """What a Swin encoder can be asked for, and with it every network around one."""

    # how 2 x 2 x 2 tokens are joined, see `CORNERS`; published weights need "published"
    merging: Literal["full", "published"]
    # how windows smaller than 7 read the bias table, see `relative_index`; published weights need "sliced"
    relative_positions: Literal["exact", "sliced"]
    # the second version of Swin UNETR: a residual block of convolutions before each stage
    residual_stages: bool
    # probability that the last block is dropped in training; it rises from 0 at the first
    drop_path: float
    # compute activations twice instead of keeping them
    checkpointing: bool


class WindowAttention(nn.Module):
    """Tokens (b, n, c) attend within windows of 7 x 7 x 7, with a learned bias for each displacement."""

    window = 7

    def __init__(self, dim: int, heads: int, relative_positions: str) -> None:
        super().__init__()
        self.heads = heads
        self.sliced = relative_positions == "sliced"
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.bias = nn.Parameter(torch.empty((2 * self.window - 1) ** 3, heads))

    def reset(self) -> None:
        nn.init.trunc_normal_(self.bias, std=0.02)

    def forward(self, x: Tensor, layout: Windows) -> Tensor:
        head = (3, self.heads, x.shape[2] // self.heads)
        qkv = self.qkv(x).unflatten(2, head)  # b n 3 h d
        # What `qkv` makes of a token of zeros stands in the padding of windows (24 tokens are padded to 28)
        # and is attended to, unmasked: a quirk of the published networks that their weights were trained
        # with.
        padding = self.qkv.bias.unflatten(0, head)
        index = relative_index(layout.size, self.window, self.sliced, x.device)
        # plain indexing is five times as slow, and two threads add its gradient up in the order they come
        bias = self.bias.t().index_select(1, index.flatten()).unflatten(1, index.shape)  # h m m
        return self.proj(attend(qkv, padding, bias, layout).flatten(2))


class Block(nn.Module):
    """Window attention and MLP, each on the normed tokens and added to them; (b, x, y, z, c)."""

    def __init__(
        self, dim: int, heads: int, *, shifted: bool, relative_positions: str, drop_path: float
    ) -> None:
        super().__init__()
        self.shifted = shifted
        self.keep = DropPath(drop_path)
        self.norm1 = nn.LayerNorm(dim)
        self.attention = WindowAttention(dim, heads, relative_positions)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        _, *size, _ = x.shape
        layout = windows((size[0], size[1], size[2]), self.attention.window, self.shifted, x.device)
        x = x.flatten(1, 3)  # b n c
        x = x + self.keep(self.attention(self.norm1(x), layout))
        x = x + self.keep(self.mlp(self.norm2(x)))
        return x.unflatten(1, size)


class PatchMerging(nn.Module):
    """2 x 2 x 2 tokens become one of twice the channels; (b, x, y, z, c), odd sizes padded with zeros."""

    def __init__(self, dim: int, merging: str) -> None:
        super().__init__()
        self.corners = CORNERS[merging]
        self.norm = nn.LayerNorm(8 * dim)
        self.reduction = nn.Linear(8 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        i, j, k = (size % 2 for size in x.shape[1:4])
        if i or j or k:
            x = F.pad(x, (0, 0, 0, k, 0, j, 0, i))
        corners = [x[:, int(at[0]) :: 2, int(at[1]) :: 2, int(at[2]) :: 2] for at in self.corners]
        return self.reduction(self.norm(torch.cat(corners, dim=-1)))


class Stage(nn.Module):
    """Blocks, every second one shifted, then merging: (b, x, y, z, c) -> (b, x/2, y/2, z/2, 2c).

    `conv` is what the second version of Swin UNETR has before them, a residual block of convolutions.
    """

    def __init__(
        self, conv: nn.Module | None, blocks: list[Block], merging: PatchMerging, *, checkpointing: bool
    ) -> None:
        super().__init__()
        self.conv = conv
        self.blocks = nn.ModuleList(blocks)
        self.merging = merging
        self.checkpointing = checkpointing

    def forward(self, x: Tensor) -> Tensor:
        if self.conv is not None:
            convolved = run(self.conv, x.movedim(-1, 1), checkpointing=self.checkpointing)
            x = convolved.movedim(1, -1).contiguous()
        for block in self.blocks:
            x = run(block, x, checkpointing=self.checkpointing)
        return self.merging(x)


class SwinEncoder(nn.Module):
    """Image (b, c, x, y, z) -> five maps at 1/2, 1/4, 1/8, 1/16 and 1/32 of its size, of `channels` channels.

    Any size: halves are rounded up (48, 24, 12, 6, 3, 2). Each map is normed over its channels on its way
    out, without learned scale; the next stage gets it as it was.
    """

    heads = (3, 6, 12, 24)

    def __init__(
        self,
        in_channels: int,
        feature_size: int,
        *,
        merging: str = "full",
        relative_positions: str = "exact",
        residual_stages: bool = False,
        drop_path: float = 0.0,
        checkpointing: bool = False,
    ) -> None:
        if feature_size < 12 or feature_size % 12:
            message = f"`feature_size` is {feature_size}"
            raise UserError(message, hint="a multiple of 12 is needed, such as 24")
        check_rate("drop_path", drop_path)
        super().__init__()
        self.channels = tuple(feature_size * 2**level for level in range(5))
        self.embedding = nn.Conv3d(in_channels, feature_size, 2, stride=2)
        rates = [drop_path * i / 7 for i in range(8)]  # the deeper the block, the more often it is dropped
        self.stages = nn.ModuleList()
        for level, (dim, heads) in enumerate(zip(self.channels, self.heads, strict=False)):
            blocks = [
                Block(dim, heads, shifted=shifted, relative_positions=relative_positions, drop_path=rate)
                for shifted, rate in zip((False, True), rates[2 * level :], strict=False)
            ]
            conv = ResidualBlock(dim, dim) if residual_stages else None
            self.stages.append(Stage(conv, blocks, PatchMerging(dim, merging), checkpointing=checkpointing))

    def embed(self, image: Tensor) -> Tensor:
        """A token for each 2 x 2 x 2 voxels, (b, x/2, y/2, z/2, feature size): what pre-training masks."""
        tokens: Tensor = self.embedding(pad_to_multiple(image, 2))
        return tokens.movedim(1, -1)

    def encode(self, tokens: Tensor) -> list[Tensor]:
        """The five maps of embedded tokens."""
        maps = [tokens]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return [F.layer_norm(x, x.shape[-1:]).movedim(-1, 1) for x in maps]  # b c x y z

    def forward(self, image: Tensor) -> list[Tensor]:
        return self.encode(self.embed(image))
