"""Windows: MONAI's numbers, finished slabs in order, several opinions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from unetrkit.errors import UserError
from unetrkit.inference import sliding_window as sliding_window_module
from unetrkit.inference.sliding_window import importance_map, scores_of, sliding_window, window_starts


def network(channels: int = 2, classes: int = 3) -> nn.Module:
    """Depends on the position in the window (zero padding), as a real network does."""
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv3d(channels, 4, 5, padding=2), nn.Tanh(), nn.Conv3d(4, classes, 3, padding=1)
    ).eval()


def whole(slabs) -> Tensor:
    """All slabs together; they must be in order and without gaps."""
    parts = []
    for start, slab in slabs:
        assert start == sum(p.shape[1] for p in parts)
        parts.append(slab)
    return torch.cat(parts, 1)


@pytest.mark.parametrize("blending", ["gaussian", "constant"])
@pytest.mark.parametrize(
    ("size", "window", "overlap"),
    [
        ((50, 41, 37), (16, 16, 16), 0.5),
        ((50, 41, 37), (32, 16, 16), 0.7),
        ((33, 20, 40), (32, 16, 48), 0.25),  # z smaller than the window
        ((10, 40, 21), (16, 32, 32), 0.5),  # x and z smaller than the window
        ((5, 6, 7), (16, 16, 16), 0.0),
        ((48, 32, 32), (16, 16, 16), 0.0),
        ((32, 32, 32), (32, 32, 32), 0.9),
    ],
)
def test_scores_equal_monai(size, window, overlap, blending):
    from monai.inferers import sliding_window_inference

    net, image = network(), torch.randn(2, *size)
    with torch.no_grad():
        theirs = sliding_window_inference(image[None], window, 4, net, overlap, blending)[0]
    ours = whole(
        sliding_window(scores_of([net]), image, window, overlap=overlap, blending=blending, window_batch=3)
    )
    assert (ours - theirs).abs().max() < 1e-5


def test_importance_map_equals_monai():
    from monai.data.utils import compute_importance_map

    assert torch.allclose(
        importance_map((96, 32, 17), "gaussian"), compute_importance_map((96, 32, 17), "gaussian")
    )


@pytest.mark.parametrize("overlap", [0, 0.25, 0.5, 0.7, 0.99])
def test_window_starts_cover_every_voxel(overlap):
    for size in range(16, 70):
        starts = window_starts(size, 16, overlap)
        assert starts == sorted(set(starts))
        assert {v for s in starts for v in range(s, s + 16)} == set(range(size))


def test_slabs_come_as_soon_as_they_are_finished():
    seen = []
    slabs = sliding_window(
        lambda w: w,
        torch.randn(1, 80, 16, 16),
        (32, 16, 16),
        progress=lambda done, total: seen.append((done, total)),
    )
    when = [(start, slab.shape[1], seen[-1]) for start, slab in slabs]
    # a step of 16 planes after each window, the whole window after the last; in slabs of 8
    after = [1, 1, 2, 2, 3, 3, 4, 4, 4, 4]
    assert when == [(8 * k, 8, (done, 4)) for k, done in enumerate(after)]


def test_an_identity_gives_the_image_back():
    image = torch.randn(2, 40, 21, 19)
    assert torch.allclose(
        whole(sliding_window(lambda w: w, image, (16, 16, 32), overlap=0.6)), image, atol=1e-6
    )


def test_slabs_stay_valid_after_the_next_one():
    image = torch.randn(1, 64, 16, 16)
    first = next(slabs := sliding_window(lambda w: w, image, (32, 16, 16)))[1]
    copy = first.clone()
    list(slabs)
    assert torch.equal(first, copy)


def test_one_opinion_gives_logits_and_several_give_mean_probabilities():
    a, b, windows = network(), nn.Conv3d(2, 3, 1), torch.randn(2, 2, 8, 8, 8)
    with torch.no_grad():
        assert torch.equal(scores_of([a])(windows), a(windows))
        expected = (a(windows).softmax(1) + b(windows).softmax(1)) / 2
        assert torch.allclose(scores_of([a, b])(windows), expected, atol=1e-6)


def test_mirrors_average_every_combination_of_axes():
    net, windows = network(), torch.randn(1, 2, 8, 8, 8)
    with torch.no_grad():
        views = [(), (2,), (3,), (4,), (2, 3), (2, 4), (3, 4), (2, 3, 4)]
        expected = sum(net(windows.flip(v)).softmax(1).flip(v) for v in views) / 8
        assert torch.allclose(scores_of([net], mirrors=(0, 1, 2))(windows), expected, atol=1e-6)


class Sides(nn.Module):
    """Says left (1) where the left half of its window is bright, right (2) where the right half is."""

    def forward(self, windows: Tensor) -> Tensor:
        bright = windows[:, :1] * 20 - 10
        half = torch.linspace(-1, 1, windows.shape[2]).sign()[:, None, None]
        left, right = (torch.where(side == half, bright, -20.0) for side in (-1, 1))
        return torch.cat([torch.zeros_like(bright), left, right], 1)


def test_left_and_right_change_places_under_a_mirror():
    windows = torch.zeros(1, 1, 8, 8, 8)
    windows[:, :, :3] = 1  # the left half only: not symmetric
    plain = scores_of([Sides()])(windows).argmax(1)
    assert set(plain.unique().tolist()) == {0, 1}
    swapped = scores_of([Sides()], mirrors=(0,), swap=(0, 2, 1))(windows)
    assert torch.equal(swapped.argmax(1), plain)
    assert swapped[:, 1, :3].min() > 0.99
    # without the exchange the two views contradict each other
    assert scores_of([Sides()], mirrors=(0,))(windows)[:, 1, :3].max() < 0.51


def test_bf16_is_close_and_adds_up_in_float32():
    net, windows = network(), torch.randn(1, 2, 8, 8, 8)
    with torch.no_grad():
        half = scores_of([net], bf16=True)(windows)
        assert half.dtype == torch.float32
        difference = (half - net(windows)).abs().max()
    assert 0 < difference < 0.05


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("full"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_too_little_memory_halves_the_batch_for_good_and_says_so_once(error, capsys):
    sizes = []
    sliding_window_module._say_once.cache_clear()

    def score(windows: Tensor) -> Tensor:
        sizes.append(len(windows))
        if len(windows) > 2:
            raise error
        return windows

    image = torch.randn(1, 32, 32, 48)
    for _ in range(2):
        slabs = sliding_window(score, image, (16, 16, 16), overlap=0, window_batch=5)
        assert torch.allclose(whole(slabs), image)
    assert sizes == 2 * [5, 2, 2, 2, 2, 2, 2]  # 6 windows at each of two places of x
    assert capsys.readouterr().err.splitlines() == [
        "warning: the memory is too small for `window_batch`: going on with 2 at a time"
    ]


def test_other_errors_and_one_window_too_many_are_passed_on():
    for error in (RuntimeError("shape"), torch.OutOfMemoryError("full")):

        def score(windows: Tensor, error: Exception = error) -> Tensor:
            raise error

        batch = 1 if isinstance(error, torch.OutOfMemoryError) else 4
        with pytest.raises(type(error), match=str(error)):
            list(sliding_window(score, torch.randn(1, 32, 32, 32), (16, 16, 16), window_batch=batch))


def test_scores_that_are_not_finite_are_refused():
    with pytest.raises(UserError, match="not finite"):
        list(sliding_window(lambda w: w / 0, torch.zeros(1, 16, 16, 16), (16, 16, 16)))


def test_no_gradient_is_recorded_and_the_caller_keeps_its_own():
    slabs = sliding_window(scores_of([network()]), torch.randn(2, 40, 16, 16), (16, 16, 16))
    assert not next(slabs)[1].requires_grad
    assert torch.is_grad_enabled()
