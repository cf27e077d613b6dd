"""What the networks are made of: the decoder's folded step, and gradients that memory does not change."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from unetrkit.networks import blocks, build
from unetrkit.networks.blocks import Convolution, Up, folding_pays


@pytest.mark.parametrize("size", [(16, 12, 20), (10, 16, 14)])
def test_folded_doubling_is_doubling_then_convolution(
    size: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    up = Up(8, 4).double()
    skip = torch.randn(2, 4, *size, dtype=torch.double, generator=generator).requires_grad_()
    coarse = torch.randn(2, 8, *(n // 2 for n in size), dtype=torch.double, generator=generator)
    coarse.requires_grad_()
    weight = torch.randn(2, 4, *size, dtype=torch.double, generator=generator)
    inputs = [coarse, skip, *up.parameters()]
    results = []
    for pays in (True, False):
        assert folding_pays(coarse, skip)
        with monkeypatch.context() as patch:
            patch.setattr(blocks, "folding_pays", lambda *maps, pays=pays: pays)
            y = up(coarse, skip)
        results.append((y, *torch.autograd.grad((y * weight).sum(), inputs)))
    for folded, plain in zip(*results, strict=True):
        torch.testing.assert_close(folded, plain)


def test_folding_is_for_maps_that_double_exactly_and_are_large() -> None:
    def pays(coarse: tuple[int, ...], skip: tuple[int, ...]) -> bool:
        return folding_pays(torch.empty(coarse, device="cpu"), torch.empty(skip, device="cpu"))

    assert pays((1, 8, 16, 16, 16), (1, 4, 32, 32, 32))
    assert not pays((1, 8, 16, 16, 16), (1, 4, 32, 31, 32))  # cropped: its edge would see beyond
    assert not pays((1, 768, 3, 3, 3), (1, 384, 6, 6, 6))  # more weights than voxels
    assert not pays((1, 8, 1, 64, 64), (1, 4, 2, 128, 128))  # see Convolution


def test_bfloat16_gradients_do_not_depend_on_what_memory_held() -> None:
    """Found where a run that went on in bf16 was not bitwise the one that was never stopped."""
    generator = torch.Generator().manual_seed(0)
    layer = Convolution(24, 24, 3, padding=1, bias=False)
    x = torch.randn(1, 24, 2, 2, 2, generator=generator)

    def gradient() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return torch.autograd.grad(layer(x).float().square().sum(), layer.weight)[0]

    first = gradient()
    for rubbish in (float("nan"), 1e30, -3.0) * 3:
        _leave_in_memory(rubbish)
        assert torch.equal(gradient(), first)


@pytest.mark.parametrize("size", [(16, 16, 16), (32, 32, 32), (24, 16, 32), (20, 33, 16)])
def test_a_whole_step_in_bfloat16_is_the_same_twice(size: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    network = build("swin_unetr_tiny", 1, 3, size, {})
    x = torch.randn(2, 1, *size)
    gradients = []
    for rubbish in (0.0, float("nan"), 1e30):
        _leave_in_memory(rubbish)
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(x)
        logits.float().square().mean().backward()
        gradients.append([p.grad.clone() for p in network.parameters() if p.grad is not None])
    for first, second, third in zip(*gradients, strict=True):
        assert torch.equal(first, second) and torch.equal(first, third)


def _leave_in_memory(value: float) -> None:
    """Free memory of many sizes, all of it holding `value`."""
    sizes = [16, 64, 100, 343, 1000, 5000, 20_000, 100_000, 300_000] * 20
    kept = [torch.full((size + 7 * i % 64,), value) for i, size in enumerate(sizes)]
    del kept
