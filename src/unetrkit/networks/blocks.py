"""What every network of the UNETR family is made of: residual blocks, the decoder, initialisation."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unetrkit.errors import UserError


def instance_norm(x: Tensor) -> Tensor:
    """Each channel of each image to mean 0 and variance 1 over its voxels; no learned scale. (b, c, x, y, z).

    A map of one voxel becomes zero, which is what the formula says: torch's `InstanceNorm3d` raises there,
    and with it the original networks at 32 x 32 x 32. The residual block's other path carries the signal on.
    """
    # a group per channel is the same function; on a CPU it takes 1.7 ms where instance_norm takes 7.2
    return torch.group_norm(x, x.shape[1], None, None, 1e-5)


def activate(x: Tensor) -> Tensor:
    """LeakyReLU, in place: what comes before it (norm, sum) does not need its own output for its gradient."""
    return F.leaky_relu(x, 0.01, inplace=True)


def conv(in_channels: int, out_channels: int, size: int) -> nn.Conv3d:
    """A convolution that keeps the grid; no bias, for a norm follows."""
    return nn.Conv3d(in_channels, out_channels, size, padding=size // 2, bias=False)


def doubling(in_channels: int, out_channels: int) -> nn.ConvTranspose3d:
    """Every voxel becomes 2 x 2 x 2 voxels."""
    return nn.ConvTranspose3d(in_channels, out_channels, 2, stride=2, bias=False)


def check_rate(option: str, rate: float) -> None:
    """Raise UserError where a probability of dropping something is none."""
    if not 0 <= rate < 1:
        raise UserError(f"`{option}` is {rate}", hint="a probability from 0 to below 1")


def run(block: nn.Module, *inputs: Tensor, checkpointing: bool) -> Tensor:
    """`block(*inputs)`; with `checkpointing` its activations are computed again for the gradient."""
    if checkpointing and torch.is_grad_enabled():
        result: Tensor = checkpoint(block, *inputs, use_reentrant=False)
        return result
    output: Tensor = block(*inputs)
    return output


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
        y = activate(instance_norm(self.conv1(x)))
        y = instance_norm(self.conv2(y))
        return activate(y + (x if self.shortcut is None else instance_norm(self.shortcut(x))))


class Up(nn.Module):
    """A coarse map doubled, cropped to its skip's size, joined with it and refined."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.doubling = doubling(in_channels, out_channels)
        self.block = ResidualBlock(2 * out_channels, out_channels)

    def forward(self, coarse: Tensor, skip: Tensor) -> Tensor:
        up = self.doubling(coarse)
        if up.shape[2:] != skip.shape[2:]:  # an odd size was padded at its high end on the way down
            x, y, z = skip.shape[2:]
            up = up[:, :, :x, :y, :z]
        return self.block(torch.cat((up, skip), dim=1))


class Decoder(nn.Module):
    """From maps of `channels` channels, finest first, back to logits on the finest map's grid."""

    def __init__(self, channels: Sequence[int], classes: int, *, checkpointing: bool = False) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.up = nn.ModuleList(Up(coarse, fine) for fine, coarse in pairwise(channels))
        self.head = nn.Conv3d(channels[0], classes, 1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        x = features[-1]
        for up, skip in zip(reversed(self.up), reversed(features[:-1]), strict=True):
            x = run(up, x, skip, checkpointing=self.checkpointing)
        logits: Tensor = self.head(x)
        return logits


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

    def forward(self, image: Tensor) -> Tensor:
        maps = [image, *self.encoder(image)]
        checkpointing = self.decoder.checkpointing
        maps = [run(skip, x, checkpointing=checkpointing) for skip, x in zip(self.skip, maps, strict=True)]
        logits: Tensor = self.decoder(maps)
        return logits


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
