"""Instance norm with LeakyReLU, in place: against its formula, in both layouts, forward and backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from unetrkit.networks.norm import CHANNELS_LAST, instance_norm_


def formula(x: Tensor, slope: float) -> Tensor:
    variance, mean = torch.var_mean(x, dim=(2, 3, 4), correction=0, keepdim=True)
    return F.leaky_relu((x - mean) / (variance + 1e-5).sqrt(), slope)


@pytest.mark.parametrize("layout", [torch.contiguous_format, CHANNELS_LAST])
@pytest.mark.parametrize("slope", [1.0, 0.01])
@pytest.mark.parametrize("size", [(2, 12, 8, 6, 16), (1, 3, 5, 7, 3), (3, 48, 4, 4, 2), (2, 2000, 2, 1, 3)])
def test_values_and_gradients_are_the_formulas(
    layout: torch.memory_format, slope: float, size: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = 5 + 3 * torch.randn(size, dtype=torch.double, generator=generator)
    gradient = torch.randn(size, dtype=torch.double, generator=generator)
    x.requires_grad_()
    expected = formula(x, slope)
    found = instance_norm_(x.clone(memory_format=layout), slope)
    torch.testing.assert_close(found, expected)
    own, wanted = (torch.autograd.grad(y, x, gradient)[0] for y in (found, expected))
    torch.testing.assert_close(own, wanted)


def test_float32_is_exact_over_a_million_voxels_far_from_zero() -> None:
    x = torch.randn(1, 12, 96, 96, 96, generator=torch.Generator().manual_seed(0)) * 2 + 10
    expected = formula(x.double(), 0.01)
    found = instance_norm_(x.contiguous(memory_format=CHANNELS_LAST), 0.01)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_bfloat16_keeps_its_sums_in_float32() -> None:
    x = (torch.randn(1, 16, 48, 48, 48, generator=torch.Generator().manual_seed(0)) + 3).bfloat16()
    expected = formula(x.double(), 1.0)
    found = instance_norm_(x.contiguous(memory_format=CHANNELS_LAST))
    assert found.dtype == torch.bfloat16
    assert (found - expected).abs().max() < 2**-8 * expected.abs().max()
    assert found.double().mean((2, 3, 4)).abs().max() < 1e-3


@pytest.mark.parametrize("layout", [torch.contiguous_format, CHANNELS_LAST])
def test_one_voxel_becomes_zero(layout: torch.memory_format) -> None:
    x = torch.full((2, 3, 1, 1, 1), 7.0, requires_grad=True)
    y = instance_norm_(x.clone(memory_format=layout))
    y.sum().backward()
    assert y.abs().max() == 0
    assert x.grad is not None and x.grad.abs().max() == 0
