"""What the networks are made of: the decoder's folded step, and gradients that memory does not change."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from unetrkit.networks import blocks, build
from unetrkit.networks.blocks import ResidualBlock, Up, folding_pays
from unetrkit.networks.convolution import Convolution, Doubling
from unetrkit.networks.norm import CHANNELS_LAST


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


@pytest.mark.parametrize("edge", [1, 0])
@pytest.mark.parametrize("shape", [(8, 6, 5), (7, 5, 4), (3, 3, 3), (1, 4, 4)])
def test_small_maps_by_onednn_equal_torchs_own(shape: tuple[int, int, int], edge: int) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = Convolution(3, 5, 2 * edge + 1, padding=edge, bias=False)
    x = torch.randn(1, 3, *shape, generator=generator).requires_grad_()
    found = layer(x)
    expected = torch.nn.functional.conv3d(x, layer.weight, padding=edge)
    assert "Small" in type(found.grad_fn).__name__ and "Small" not in type(expected.grad_fn).__name__
    gradient = torch.randn(found.shape, generator=generator)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for own, other in zip(
        *(torch.autograd.grad(y, (x, layer.weight), gradient) for y in (found, expected)), strict=True
    ):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 2])
def test_doubling_is_the_transposed_convolution(batch: int) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = Doubling(5, 3).double()
    x = torch.randn(batch, 5, 3, 4, 2, dtype=torch.double, generator=generator).requires_grad_()
    expected = torch.nn.functional.conv_transpose3d(x, layer.weight, stride=2)
    gradient = torch.randn(expected.shape, dtype=torch.double, generator=generator)
    results = [(y, *torch.autograd.grad(y, (x, layer.weight), gradient)) for y in (layer(x), expected)]
    for own, other in zip(*results, strict=True):
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize("name", ["unetr", "swin_unetr_tiny"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_map_on_a_cpu_is_channels_last(name: str, dtype: torch.dtype) -> None:
    """One that is not makes each layer after it, and its gradient, several times as slow."""
    size = {"depth": 4, "width": 24, "heads": 2} if name == "unetr" else {}
    network = build(name, 1, 3, (64, 64, 64), size)
    others = []

    def look(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if not output.is_contiguous(memory_format=CHANNELS_LAST) and output.shape[1] > 1:
            others.append(module)

    for module in network.modules():
        # on one thread torch computes 1 x 1 x 1 convolutions itself, and not channels last
        if getattr(module, "kernel_size", None) == (1, 1, 1):
            continue
        if isinstance(module, (Convolution, Doubling, ResidualBlock, Up)):
            module.register_forward_hook(look)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        network(torch.randn(1, 1, 64, 64, 64))
    assert not others


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
