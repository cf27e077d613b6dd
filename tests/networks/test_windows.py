"""Windows as index tables and attention within them, against a loop that does what the words say."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from unetrkit.networks.windows import _attention, attend, relative_index, windows

CPU = torch.device("cpu")


def banal(qkv: Tensor, padding: Tensor, bias: Tensor, grid: tuple[int, ...], n: int, shifted: bool) -> Tensor:
    """Attention of each token, one by one: who is in its window, and not across the edge of the grid."""
    _, _, heads, d = qkv.shape
    side = [min(extent, n) for extent in grid]
    by = [n // 2 if shifted and extent > n else 0 for extent in grid]
    padded = [-(-extent // s) * s for extent, s in zip(grid, side, strict=True)]
    places = [(i, j, k) for i in range(side[0]) for j in range(side[1]) for k in range(side[2])]
    out = torch.zeros(len(qkv), heads, d, dtype=qkv.dtype)
    for token in range(len(qkv)):
        at = (token // (grid[1] * grid[2]), token // grid[2] % grid[1], token % grid[2])
        rolled = [(a - s) % p for a, s, p in zip(at, by, padded, strict=True)]
        corner = [r // s * s for r, s in zip(rolled, side, strict=True)]
        own = places.index(tuple(r - c for r, c in zip(rolled, corner, strict=True)))
        keys, values, extra = [], [], []
        for index, place in enumerate(places):
            spot = [c + p for c, p in zip(corner, place, strict=True)]
            # the part that was rolled from the beginning to the end of an axis does not see the rest of it
            if any(
                s and (x >= p - s) != (r >= p - s)
                for s, x, r, p in zip(by, spot, rolled, padded, strict=True)
            ):
                continue
            source = [(x + s) % p for x, s, p in zip(spot, by, padded, strict=True)]
            real = all(x < extent for x, extent in zip(source, grid, strict=True))
            row = qkv[(source[0] * grid[1] + source[1]) * grid[2] + source[2]] if real else padding
            keys.append(row[1])
            values.append(row[2])
            extra.append(bias[:, own, index])
        scores = torch.einsum("hd,nhd->hn", qkv[token, 0], torch.stack(keys)) / math.sqrt(d)
        weights = (scores + torch.stack(extra, dim=1)).softmax(dim=1)
        out[token] = torch.einsum("hn,nhd->hd", weights, torch.stack(values))
    return out


@pytest.mark.parametrize("shifted", [False, True])
# whole windows; padding in the last window; padding that reaches back into the last but one; one window
@pytest.mark.parametrize("grid", [(6, 3, 6), (5, 7, 2), (4, 4, 7), (2, 3, 1)])
def test_attention_equals_the_banal_loop(grid: tuple[int, int, int], shifted: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    layout = windows(grid, 3, shifted, CPU)
    m = math.prod(layout.size)
    qkv = torch.randn(2, math.prod(grid), 3, 2, 4, dtype=torch.double, generator=generator)
    padding = torch.randn(3, 2, 4, dtype=torch.double, generator=generator)
    bias = torch.randn(2, m, m, dtype=torch.double, generator=generator)
    found = attend(qkv, padding, bias, layout)
    for b in range(2):
        torch.testing.assert_close(found[b], banal(qkv[b], padding, bias, grid, 3, shifted))


def test_gradients_are_the_numerical_ones() -> None:
    layout = windows((4, 2, 5), 3, True, CPU)
    m = math.prod(layout.size)
    sizes = [(1, 40, 3, 1, 2), (3, 1, 2), (1, m, m)]
    inputs = [torch.randn(size, dtype=torch.double, requires_grad=True) for size in sizes]
    assert torch.autograd.gradcheck(lambda *x: attend(*x, layout), inputs, fast_mode=True)


def test_gradients_equal_torchs_own_over_many_chunks() -> None:
    w, h, m, n, d = 11, 3, 250, 343, 4
    inputs = [
        torch.randn(size, requires_grad=True)
        for size in [(w, h, m, d), (w, h, n, d), (w, h, n, d), (h, m, n)]
    ]
    q, k, v, bias = inputs
    gradient = torch.randn(w, h, m, d)
    expected = ((q @ k.transpose(2, 3)) * d**-0.5 + bias).softmax(dim=-1) @ v
    found = _attention(q, k, v, bias)
    torch.testing.assert_close(found, expected)
    own, torchs = (torch.autograd.grad(x, inputs, gradient) for x in (found, expected))
    for a, b in zip(own, torchs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_exact_index_is_the_displacement_at_every_window_size() -> None:
    full = relative_index((7, 7, 7), 7, False, CPU).view(7, 7, 7, 7, 7, 7)
    small = relative_index((2, 7, 4), 7, False, CPU).view(2, 7, 4, 2, 7, 4)
    assert torch.equal(small, full[:2, :, :4, :2, :, :4])
    assert full.unique().numel() == 13**3
    assert full[3, 1, 0, 2, 5, 6] == (1 + 6) * 169 + (-4 + 6) * 13 + (-6 + 6)


def test_sliced_index_is_wrong_for_98_percent_at_6() -> None:
    exact, sliced = (relative_index((6, 6, 6), 7, way, CPU) for way in (False, True))
    assert torch.equal(sliced, relative_index((7, 7, 7), 7, False, CPU)[:216, :216])
    assert (exact != sliced).double().mean().item() == pytest.approx(0.98, abs=0.01)
    assert torch.equal(relative_index((7, 7, 7), 7, True, CPU), relative_index((7, 7, 7), 7, False, CPU))


def test_layouts_are_remembered_and_the_memory_is_bounded() -> None:
    from unetrkit.networks.windows import _windows

    assert windows((9, 9, 9), 7, True, CPU) is windows((9, 9, 9), 7, True, CPU)
    assert _windows.cache_info().maxsize == 64
