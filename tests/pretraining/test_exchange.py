"""Blocks of noise and of other crops, against plain loops and by their statistics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from unetrkit.pretraining.exchange import Exchange, draw_exchange, exchange


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def crops(*shape: int) -> Tensor:
    """Each crop has values of its own, 10 or more: the noise is below."""
    image = torch.rand(shape, generator=seeded(1))
    return image + 10 * torch.arange(1, shape[0] + 1).view(-1, 1, 1, 1, 1)


def volume(blocks: list) -> int:
    return sum(int(np.prod([s.stop - s.start for s in block])) for block in blocks)


def test_blocks_are_the_published_ones_at_96() -> None:
    size, generator = (96, 96, 96), seeded()
    drawn = [draw_exchange(generator, 4, size, 0.3) for _ in range(50)]
    every = [blocks for one in drawn for blocks in one.noise]
    share = np.array([volume(blocks) for blocks in every]) / 96**3
    # uniform up to 30 %, and no more than one block of 23^3 above
    assert share.mean() == pytest.approx(0.15, abs=0.02) and share.max() <= 0.3 + 23**3 / 96**3
    assert share.min() < 0.02
    ends = [s for blocks in every for block in blocks for s in block]
    sides = [s.stop - s.start for s in ends if s.stop < 96]
    assert (min(sides), max(sides)) == (4, 23)
    starts = [s.start for s in ends]
    assert (min(starts), max(starts)) == (0, 91)
    assert np.mean(starts) == pytest.approx(45.5, abs=1)
    partners = np.array([one.partner for one in drawn])
    assert (abs(np.bincount(partners.ravel()) - 50) < 25).all()
    for one in drawn:
        assert [bool(t) for t in one.taken] == [k != i for i, k in enumerate(one.partner)]


def test_blocks_stop_as_soon_as_they_are_enough() -> None:
    for seed in range(20):
        one = draw_exchange(seeded(seed), 1, (40, 60, 96), 0.3)
        assert volume(one.noise[0][:-1]) <= 0.3 * 40 * 60 * 96
    assert draw_exchange(seeded(), 3, (32, 32, 32), 0.0).noise == ([], [], [])


@pytest.mark.parametrize("channels", [1, 2])
def test_noise_is_normal_and_scaled_in_each_block(channels: int) -> None:
    x = crops(1, channels, 30, 30, 30)
    far, near = (slice(0, 12), slice(0, 12), slice(0, 12)), (slice(15, 27), slice(14, 28), slice(13, 30))
    over = (slice(6, 14), slice(6, 14), slice(6, 14))  # painted over a corner of the first
    found = exchange(Exchange(([far, near, over],), (0,), ([],), 4), x)[0]
    left = torch.ones(30, 30, 30, dtype=torch.bool)
    first = torch.zeros(30, 30, 30, dtype=torch.bool)
    first[far] = True
    first[over] = False
    for channel in range(channels):
        seen = [found[channel][first], found[channel][near].flatten(), found[channel][over].flatten()]
        for noise in seen:
            assert noise.min() == 0 and noise.max() == 1
            standard = (noise - noise.mean()) / noise.std()
            assert abs(standard.pow(3).mean()) < 0.3 and abs(standard.pow(4).mean() - 3) < 0.6  # normal
    for block in (far, near, over):
        left[block] = False
    assert torch.equal(found[:, left], x[0][:, left])
    if channels == 2:
        assert not torch.equal(found[0][near], found[1][near])


def by_loop(drawn: Exchange, x: Tensor, noisy: Tensor, clean: bool) -> Tensor:
    """As published, one crop after the other; `noisy` has the noise of every crop."""
    result = x.clone()
    for i in range(len(x)):
        result[i] = noisy[i]
        for block in drawn.taken[i]:
            region = (slice(None), *block)
            result[i][region] = (x if clean else result)[drawn.partner[i]][region]
    return result


@pytest.mark.parametrize("clean", [True, False])
def test_regions_come_from_the_partner_as_in_a_plain_loop(clean: bool) -> None:
    x = crops(4, 2, 20, 24, 28)
    for seed in range(10):
        drawn = draw_exchange(seeded(seed), 4, x.shape[2:], 0.5)
        only_noise = Exchange(drawn.noise, (0, 1, 2, 3), ([], [], [], []), drawn.seed)
        expected = by_loop(drawn, x, exchange(only_noise, x), clean)
        assert torch.equal(exchange(drawn, x, clean=clean), expected)


def test_only_the_published_mixing_takes_over_what_was_corrupted_before() -> None:
    x = crops(2, 1, 8, 8, 8)
    whole = (slice(0, 8), slice(0, 8), slice(0, 8))
    drawn = Exchange(([whole], []), (0, 0), ([], [whole]), 0)
    assert torch.equal(exchange(drawn, x)[1], x[0])
    published = exchange(drawn, x, clean=False)
    assert torch.equal(published[1], published[0]) and published[1].max() == 1


@pytest.mark.parametrize("size", [(1, 1, 1), (3, 19, 40), (16, 16, 16)])
def test_any_size_is_corrupted(size: tuple[int, int, int]) -> None:
    x = crops(3, 1, *size)
    kept = x.clone()
    changed = 0
    for seed in range(20):
        drawn = draw_exchange(seeded(seed), 3, size, 0.3)
        found = exchange(drawn, x)
        assert found.shape == x.shape and found.isfinite().all()
        changed += int((found != x).any())
    assert changed == 20 and torch.equal(x, kept)
