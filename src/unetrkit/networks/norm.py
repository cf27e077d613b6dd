"""Instance norm and LeakyReLU in one: in place, and with nothing kept for the gradient but the result."""

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

EPSILON = 1e-5
CHANNELS_LAST = torch.channels_last_3d
# numbers of a row in which a channels-last image is read: few channels, several voxels of them, so that a
# CPU's vectors are full and sums, one for each number of the row, are short enough to be exact in float32
ROW = 1024


def instance_norm_(x: Tensor, slope: float = 1.0) -> Tensor:
    """Each channel of each image to mean 0 and variance 1 over its voxels, then LeakyReLU with `slope`.

    (b, c, x, y, z); no learned scale. May overwrite x: give it what nobody else reads, a convolution's
    output. What it gives back it keeps for the gradient: nothing may overwrite that.

    A map of one voxel becomes zero, which is what the formula says: torch's `InstanceNorm3d` raises there,
    and with it the original networks at 32 x 32 x 32. The residual block's other path carries the signal on.
    """
    last = x.is_contiguous(memory_format=CHANNELS_LAST)
    known = x.dtype in (torch.float32, torch.float64, torch.bfloat16)
    if x.is_cpu and last and known and not torch.compiler.is_compiling():
        return _InstanceNorm.apply(x, slope)
    # a group per channel is the same function; on a CPU it takes 1.7 ms where instance_norm takes 7.2
    y = torch.group_norm(x, x.shape[1], None, None, EPSILON)
    return y if slope == 1 else F.leaky_relu(y, slope, inplace=True)


class _InstanceNorm(torch.autograd.Function):
    """`instance_norm_` of channels-last images on a CPU, made of torch's batch norm kernels, image by image.

    torch's own group norm takes ten times as long here as in the other layout, its gradient fifty times
    (LOG.md). LeakyReLU can be undone, so that the result is all the gradient needs (Rota Bulò et al. 2018,
    https://arxiv.org/abs/1712.02616): the convolution's output is not kept.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, slope: float) -> Tensor:
        scales = []
        for rows in _rows(x):
            mean, variance = _moments(rows, x.shape[1])
            scale = (variance + EPSILON).rsqrt()
            _affine(rows, scale, -mean * scale, out=rows)
            scales.append(scale)
        if slope != 1:
            F.leaky_relu(x, slope, inplace=True)
        ctx.mark_dirty(x)
        ctx.save_for_backward(x, *scales)
        ctx.slope = slope  # type: ignore[attr-defined]
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        y, *scales = ctx.saved_tensors  # type: ignore[attr-defined]
        slope: float = ctx.slope  # type: ignore[attr-defined]
        gradient = gradient.to(y.dtype).contiguous(memory_format=CHANNELS_LAST)
        if slope == 1:  # both belong to others
            g, dx, dy = gradient, torch.empty_like(gradient), torch.empty_like(y)
        else:
            dx = g = torch.ops.aten.leaky_relu_backward(gradient, y, slope, True)
            dy = y = F.leaky_relu(y, 1 / slope)
        count = prod(y.shape[2:])
        images = zip(_rows(g), _rows(y), _rows(dx), _rows(dy), scales, strict=True)
        for g_rows, y_rows, dx_rows, dy_rows, scale in images:
            total, along = _sums(g_rows, y_rows, len(scale))
            # scale * (g - mean(g) - y * mean(g * y))
            _affine(g_rows, scale, -scale * total / count, out=dx_rows)
            _affine(y_rows, -scale * along / count, torch.zeros_like(scale), out=dy_rows)
        return dx.add_(dy), None


def _rows(x: Tensor) -> list[Tensor]:
    """Each image as (1, k*c, voxels/k, 1), channels last: rows of k voxels with all their channels."""
    b, c, *size = x.shape
    voxels, k = prod(size), 1
    while voxels % (2 * k) == 0 and 2 * k * c <= ROW:
        k *= 2
    shape, stride = (1, k * c, voxels // k, 1), (voxels * c, 1, k * c, k * c)
    return [x.as_strided(shape, stride, x.storage_offset() + i * voxels * c) for i in range(b)]


def _moments(rows: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel, in float32 at least."""
    n = rows.shape[1]
    space = torch.zeros(n, dtype=_wide(rows)), torch.ones(n, dtype=_wide(rows))
    means, variances = torch.batch_norm_update_stats(rows, *space, 0.0)
    means, variances = (t.double().view(-1, channels) for t in (means, variances))
    variance = variances.mean(0) + means.var(0, correction=0)
    return means.mean(0).to(_wide(rows)), variance.to(_wide(rows))


def _affine(rows: Tensor, scale: Tensor, shift: Tensor, out: Tensor) -> None:
    """rows * scale + shift, a scale and a shift for each channel, to `out`, which may be `rows`."""
    k = rows.shape[1] // len(scale)
    zero, one = torch.zeros(k * len(scale), dtype=scale.dtype), torch.ones(k * len(scale), dtype=scale.dtype)
    unused = torch.empty(0, dtype=scale.dtype)
    torch.ops.aten.native_batch_norm.out(
        rows, scale.repeat(k), shift.repeat(k), zero, one, False, 0.0, 0.0,
        out=out, save_mean=unused, save_invstd=unused.clone(),
    )  # fmt: skip


def _sums(g: Tensor, y: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Of each channel the sum of g and that of g * y."""
    n = g.shape[1]
    zero, one = torch.zeros(n, dtype=_wide(g)), torch.ones(n, dtype=_wide(g))
    _, along, total = torch.ops.aten.native_batch_norm_backward(
        g, y, one, zero, one, None, None, False, 0.0, [False, True, True]
    )
    total, along = (t.double().view(-1, channels).sum(0).to(_wide(g)) for t in (total, along))
    return total, along


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
