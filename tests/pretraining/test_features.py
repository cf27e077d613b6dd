"""Figures of features: analytic cases; collapses are found, healthy features are not called one."""

from __future__ import annotations

import math

import pytest
import torch

from unetrkit.pretraining.features import Geometry, collapse, effective_rank, geometry


def cloud(crops: int, channels: int, directions: int, spread: float, seed: int = 0) -> torch.Tensor:
    """Features about a mean of length 1, `spread` away from it in so many directions."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(channels, directions, generator=generator))[0]
    mean = torch.nn.functional.normalize(torch.randn(channels, generator=generator), dim=0)
    return mean + spread * torch.randn(crops, directions, generator=generator) @ basis.T / math.sqrt(
        directions
    )


def test_effective_rank_is_the_number_of_equal_directions() -> None:
    values = torch.diag(torch.tensor([2.0, 2.0, 2.0, 0.0]))
    assert effective_rank(values) == pytest.approx(3)
    unequal = torch.diag(torch.tensor([3.0, 1.0]))
    assert effective_rank(unequal) == pytest.approx(
        math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    )
    assert effective_rank(torch.zeros(3, 5)) == 0


def test_alignment_and_uniformity_are_the_published_formulas() -> None:
    first, second = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(1))
    unit = [[v / sum(x * x for x in row) ** 0.5 for v in row] for row in first.tolist()]
    other = [[v / sum(x * x for x in row) ** 0.5 for v in row] for row in second.tolist()]

    def distance(a: list[float], b: list[float]) -> float:
        return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))

    pairs = [math.exp(-2 * distance(unit[i], unit[j])) for i in range(6) for j in range(i)]
    found = geometry(first, second)
    assert found.alignment == pytest.approx(sum(map(distance, unit, other)) / 6, rel=1e-5)
    assert found.uniformity == pytest.approx(math.log(sum(pairs) / 15), rel=1e-5)


def test_scale_of_the_features_changes_nothing() -> None:
    first, second = cloud(20, 12, 5, 0.5), cloud(20, 12, 5, 0.5, seed=1)
    assert geometry(100 * first, 100 * second) == pytest.approx(geometry(first, second), rel=1e-4)


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (cloud(32, 48, 20, 0.005), "all crops look alike"),
        (torch.ones(32, 48), "all crops look alike"),
        (cloud(32, 48, 1, 0.5), "one direction only"),
        (cloud(32, 48, 20, 0.5), ""),
        (cloud(32, 48, 4, 0.1), ""),  # fewer directions, closer: as a network that learns may be
    ],
)
def test_collapse_is_told_from_learning(now: torch.Tensor, words: str) -> None:
    before = geometry(*(cloud(32, 48, 10, 0.2, seed) for seed in (2, 3)))
    reason = collapse(geometry(now, now), before)
    assert (words in reason) if words else not reason


def test_untrained_features_are_no_collapse() -> None:
    before = Geometry(spread=0.01, effective_rank=1.1, alignment=0.0, uniformity=-0.01)
    assert not collapse(before, before)
