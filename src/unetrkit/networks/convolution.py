"""Convolutions that are right and fast on every CPU, where torch's own are not always."""

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from unetrkit.networks.norm import CHANNELS_LAST


def arranged(image: Tensor) -> Tensor:
    """The image as its device computes fastest: on a CPU channels last, which every layer then hands on."""
    if not image.is_cpu:
        return image
    if image.shape[1] == 1:  # the numbers lie the same both ways, and torch would take the other one
        image = image.contiguous()
        return image.as_strided(image.shape, (image.stride(0), 1, *image.stride()[2:]))
    return image.contiguous(memory_format=CHANNELS_LAST)


class Convolution(nn.Conv3d):
    """A `Conv3d` that is right in bf16 on every CPU, and in float32 as fast for small maps as for large ones.

    Of a map 2 voxels long on its first axis, torch 2.13's (oneDNN 3.12) gradient of a 3 x 3 x 3 weight in
    bf16 reads memory that nobody wrote, on a processor with AVX-512 bf16 and no AMX: every run another
    gradient, NaN at times. Such maps are the smallest ones: in float32 they cost nothing.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cpu and x.shape[2] == 2 and torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                return self(x.to(self.weight.dtype))
        if self.bias is None and is_left_to_torch(x):
            return _SmallConvolution.apply(x, self.weight)
        return super().forward(x)


def is_left_to_torch(x: Tensor) -> bool:
    """Whether torch convolves x by a kernel of its own, not by oneDNN: see `_SmallConvolution`."""
    few = len(x) == 1 and prod(x.shape[1:4]) <= 20480  # as in its `ConvParams::use_mkldnn`
    plain = x.is_cpu and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return few and plain and torch.backends.mkldnn.is_available() and not torch.compiler.is_compiling()


class _SmallConvolution(torch.autograd.Function):
    """The convolution of a single float32 map of few numbers, or of one channel, on a CPU by oneDNN.

    torch leaves those to a kernel of its own: 3 to 5 times as slow, and its result is not channels last, by
    which all that follows is slow too (LOG.md).
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, Tensor]:
        x, weight = ctx.saved_tensors  # type: ignore[attr-defined]
        gradient = gradient.contiguous(memory_format=CHANNELS_LAST)
        dx = None
        if ctx.needs_input_grad[0]:  # type: ignore[attr-defined]
            dx = _onednn(gradient, weight.flip(2, 3, 4).transpose(0, 1))
        # only a batch of two is given to oneDNN here: the two halves of the map, each with its edge
        edge, odd = weight.shape[2] // 2, x.shape[2] % 2
        half = (x.shape[2] + odd) // 2
        x = F.pad(x, (0, 0, 0, 0, edge, edge + odd))
        halves = arranged(torch.cat((x[:, :, : half + 2 * edge], x[:, :, half:])))
        gradient = F.pad(gradient, (0, 0, 0, 0, 0, odd)) if odd else gradient
        gradients = gradient.movedim(1, -1)[0].unflatten(0, (2, half)).movedim(-1, 1)  # as they lie
        one, none = [1] * 3, [0] * 3
        _, dweight, _ = torch.ops.aten.convolution_backward(
            gradients, halves, weight, None, one, [0, edge, edge], one, False, none, 1, [False, True, False]
        )
        return dx, dweight


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    return torch.mkldnn_convolution(x, weight, None, [weight.shape[2] // 2] * 3, [1] * 3, [1] * 3, 1)


def conv(in_channels: int, out_channels: int, size: int) -> nn.Conv3d:
    """A convolution that keeps the grid; no bias, for a norm follows."""
    return Convolution(in_channels, out_channels, size, padding=size // 2, bias=False)


class Doubling(nn.ConvTranspose3d):
    """Every voxel becomes 2 x 2 x 2 voxels.

    On a CPU as what it is, a linear layer whose results are laid out as cubes: as fast as torch's own at the
    best, and in the layout of the map whatever its size, which torch's is not (see `Convolution`).
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 2, stride=2, bias=False)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        if not x.is_cpu:
            return super().forward(x)
        y = F.linear(x.movedim(1, -1), self.weight.permute(2, 3, 4, 1, 0).flatten(0, 3))  # b x y z 8c
        y = y.unflatten(4, (2, 2, 2, -1)).permute(0, 1, 4, 2, 5, 3, 6, 7)  # b x 2 y 2 z 2 c
        return y.flatten(5, 6).flatten(3, 4).flatten(1, 2).movedim(-1, 1)
