"""What every network of the UNETR family is made of: residual blocks, the decoder, initialisation."""

from collections.abc import Sequence
from itertools import pairwise
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unetrkit.errors import UserError
from unetrkit.networks.convolution import Doubling, arranged, conv, is_left_to_torch
from unetrkit.networks.norm import instance_norm_

SLOPE = 0.01  # of every LeakyReLU


def check_rate(option: str, rate: float) -> None:
    """Raise UserError where a probability of dropping something is none."""
    if not 0 <= rate < 1:
        raise UserError(f"`{option}` is {rate}", hint="a probability from 0 to below 1")


def run(block: nn.Module, *inputs: Tensor, checkpointing: bool) -> Tensor:
    """`block(*inputs)`; with `checkpointing` its activations are computed again for the gradient."""
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)


def initialise(network: nn.Module) -> None:
    """How every network begins: as the published vision transformers do, convolutions as torch does.

    * linear layers: normal(0, 0.02), their bias 0; layer norms: 1 and 0
    * position embeddings and bias tables: normal(0, 0.02), in their module's `reset`
    * convolutions, and the patch embedding "conv": uniform within 1 / sqrt(number of inputs)
    """
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in network.modules():
        reset = getattr(module, "reset", None)
        if callable(reset):
            reset()


class ResidualBlock(nn.Module):
    """Two 3 x 3 x 3 convolutions with instance norm, beside a shortcut; (b, c, x, y, z), same grid."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, out_channels, 3)
        self.conv2 = conv(out_channels, out_channels, 3)
        self.shortcut = conv(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self.conv1(x), x if self.shortcut is None else instance_norm_(self.shortcut(x)))

    def join(self, y: Tensor, beside: Tensor) -> Tensor:
        """What follows the first convolution, given its output y and the shortcut's."""
        y = self.conv2(instance_norm_(y, SLOPE))
        return F.leaky_relu(instance_norm_(y) + beside, SLOPE, inplace=True)


class Up(nn.Module):
    """A coarse map doubled, cropped to its skip's size, joined with it and refined."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.doubling = Doubling(in_channels, out_channels)
        self.block = ResidualBlock(2 * out_channels, out_channels)

    def forward(self, coarse: Tensor, skip: Tensor) -> Tensor:
        if folding_pays(coarse, skip) and not (is_left_to_torch(coarse) or is_left_to_torch(skip)):
            return self.folded(coarse, skip)
        up = self.doubling(coarse)
        if up.shape[2:] != skip.shape[2:]:  # an odd size was padded at its high end on the way down
            x, y, z = skip.shape[2:]
            up = up[:, :, :x, :y, :z]
        return self.block(torch.cat((up, skip), dim=1))

    def folded(self, coarse: Tensor, skip: Tensor) -> Tensor:
        """The same, the doubling and what the block's two convolutions make of it in one convolution each.

        A third of the arithmetic, and neither the doubled map nor the joined one is ever made.
        """
        assert self.block.shortcut is not None  # twice the channels come in
        joined = []
        for convolution in (self.block.conv1, self.block.shortcut):
            doubled, beside = convolution.weight.chunk(2, dim=1)
            with torch.autocast(coarse.device.type, enabled=False):  # every voxel sees these: in float32
                weight = F.conv3d(self.doubling.weight, doubled, padding=doubled.shape[2] - 1)
            edge = doubled.shape[2] // 2
            y = F.conv3d(skip, beside, padding=edge)
            y += F.conv_transpose3d(coarse, weight, stride=2, padding=edge)
            joined.append(y)
        return self.block.join(joined[0], instance_norm_(joined[1]))


def folding_pays(coarse: Tensor, skip: Tensor) -> bool:
    """Whether `Up.folded` gives the same and is faster. Measured on CPUs only.

    Not at the coarse levels, where there are more weights to fold than voxels to gain from it, nor where the
    doubled map is cropped before it is refined.
    """
    doubles = all(fine == 2 * size for fine, size in zip(skip.shape[2:], coarse.shape[2:], strict=True))
    doubles = doubles and skip.shape[2] > 2  # see `Convolution`
    return doubles and skip.is_cpu and len(skip) * prod(skip.shape[2:]) > 40 * coarse.shape[1]


class Decoder(nn.Module):
    """From maps of `channels` channels, finest first, back to logits on the finest map's grid.

    deep_supervision: how many of the coarser maps on that way say logits too, in `scales`, so that a loss
    reaches them directly. Lee et al. 2015, https://arxiv.org/abs/1409.5185

    Raises UserError where there are not so many; the bottom of the U is none of them.
    """

    def __init__(
        self, channels: Sequence[int], classes: int, *, checkpointing: bool = False, deep_supervision: int = 0
    ) -> None:
        super().__init__()
        if not 0 <= deep_supervision <= len(channels) - 2:
            hint = f"the decoder has {len(channels) - 2} maps that are coarser than the image"
            raise UserError(f"`deep_supervision` is {deep_supervision}", hint=hint)
        self.checkpointing = checkpointing
        self.up = nn.ModuleList(Up(coarse, fine) for fine, coarse in pairwise(channels))
        self.head = nn.Conv3d(channels[0], classes, 1)
        coarser = channels[1 : 1 + deep_supervision]
        self.coarse_heads = nn.ModuleList(nn.Conv3d(width, classes, 1) for width in coarser)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return self._logits(features, [self.head])[0]

    def scales(self, features: Sequence[Tensor]) -> list[Tensor]:
        """The logits of `forward`, then those of the coarser maps."""
        return self._logits(features, [self.head, *self.coarse_heads])

    def _logits(self, features: Sequence[Tensor], heads: Sequence[nn.Module]) -> list[Tensor]:
        x, logits = features[-1], []
        for level in reversed(range(len(self.up))):
            x = self.step(level, x, features)
            if level < len(heads):
                logits.append(heads[level](x))
        return logits[::-1]

    def step(self, level: int, x: Tensor, features: Sequence[Tensor]) -> Tensor:
        """The decoder's map of a level from that of the level below."""
        return run(self.up[level], x, features[level], checkpointing=self.checkpointing)


class EncoderDecoder(nn.Module):
    """Image (b, c, x, y, z) -> logits (b, classes, x, y, z), of any size: the whole U in three parts.

    `skip[0]` takes the image, `skip[i]` the encoder's i-th map, the last one the bottom of the U. Levels are
    counted from the image down, in `skip` and in `decoder.up`.
    """

    def __init__(self, encoder: nn.Module, skip: Sequence[nn.Module], decoder: Decoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.skip = nn.ModuleList(skip)
        self.decoder = decoder
        initialise(self)

    @property
    def deep_supervision(self) -> int:
        """How many coarser scales there are in `scales`."""
        return len(self.decoder.coarse_heads)

    def forward(self, image: Tensor) -> Tensor:
        image = arranged(image)
        return self.decode([image, *self.encoder(image)])

    def scales(self, image: Tensor) -> list[Tensor]:
        """The logits of `forward`, then those at 1/2, 1/4, … of the image's size, rounded up."""
        x, y, z = image.shape[2:]
        image, scales = arranged(image), []
        for logits in self.decoder.scales(self._skipped([image, *self.encoder(image)])):
            scales.append(logits[:, :, :x, :y, :z])  # beyond that a vision transformer's image was padded
            x, y, z = (-(-size // 2) for size in (x, y, z))
        return scales

    def decode(self, maps: Sequence[Tensor]) -> Tensor:
        """The image, as `arranged`, and the encoder's maps -> logits."""
        return self.decoder(self._skipped(maps))

    def _skipped(self, maps: Sequence[Tensor]) -> list[Tensor]:
        checkpointing = self.decoder.checkpointing
        return [run(skip, x, checkpointing=checkpointing) for skip, x in zip(self.skip, maps, strict=True)]


class DropPath(nn.Module):
    """Stochastic depth: while training each image of (b, n, c) loses its branch with probability `rate`."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return branch
        kept = torch.rand(len(branch), 1, 1, device=branch.device) >= self.rate
        return branch * (kept / (1 - self.rate)).to(branch.dtype)


class Mlp(nn.Module):
    """Linear, GELU, linear, on the last axis."""

    def __init__(self, dim: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear1 = nn.Linear(dim, hidden)
        self.linear2 = nn.Linear(hidden, dim)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(F.gelu(self.linear1(x)), self.dropout, self.training)
        return F.dropout(self.linear2(x), self.dropout, self.training)


def pad_to_multiple(image: Tensor, multiple: int) -> Tensor:
    """Zeros at the high end of each spatial axis, up to a multiple, as convolutions pad; (b, c, x, y, z)."""
    missing = [-size % multiple for size in image.shape[2:]]
    if not any(missing):
        return image
    x, y, z = missing
    return F.pad(image, (0, z, 0, y, 0, x))
