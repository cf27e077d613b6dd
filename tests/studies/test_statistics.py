"""Intervals and verdicts on synthetic differences of known size."""

from __future__ import annotations

import math

import numpy as np
import pytest

from unetrkit.studies import statistics
from unetrkit.studies.statistics import Difference, mean_difference, paired_means

SUBJECTS = [f"s{n}" for n in range(8)]


@pytest.fixture(autouse=True)
def fewer_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 400)


def draw(random: np.random.Generator, seeds: int, spread: tuple[float, float, float], effect: float = 0.0):
    """Differences (seeds, 8 subjects, 2 organs): of subjects, of seeds, of each run on each case."""
    of_subject, of_seed, of_both = spread
    subject = of_subject * random.standard_normal((1, 8, 1))
    seed = of_seed * random.standard_normal((seeds, 1, 1))
    return effect + subject + seed + of_both * random.standard_normal((seeds, 8, 2))


def simulate(seeds: int, spread: tuple[float, float, float], effect: float = 0.0, times: int = 600):
    random = np.random.default_rng(1)
    return [mean_difference(draw(random, seeds, spread, effect), SUBJECTS) for _ in range(times)]


# spreads as Dice has them: subjects and runs alike, no effect of the seed, a strong one
@pytest.mark.parametrize(
    ("seeds", "spread"),
    [
        (1, (0.02, 0.0, 0.02)),
        (2, (0.02, 0.006, 0.02)),
        (3, (0.02, 0.006, 0.02)),
        (3, (0.0, 0.0, 0.03)),
        (3, (0.02, 0.02, 0.006)),
        (5, (0.01, 0.01, 0.02)),
    ],
)
def test_the_interval_holds_the_truth_about_95_times_in_100(seeds, spread):
    held = [d.low <= 0 <= d.high for d in simulate(seeds, spread)]
    # 600 simulations: +- 0.018; with few seeds it errs to either side by 2 in 100
    assert 0.925 <= np.mean(held) <= 0.985


def test_a_percentile_interval_of_subjects_alone_calls_differences_that_are_not_there():
    """Why seeds are resampled too, and why the interval is stretched."""
    random = np.random.default_rng(1)
    wrong = 0
    for _ in range(300):
        table = draw(random, 3, (0.02, 0.01, 0.02)).mean(axis=(0, 2))
        means = table[random.integers(0, 8, (400, 8))].mean(axis=1)
        low, high = np.percentile(means, [2.5, 97.5])
        wrong += not low <= 0 <= high
    assert wrong / 300 > 0.12
    assert np.mean([d.told for d in simulate(3, (0.02, 0.01, 0.02), times=300)]) < 0.075


def test_an_effect_is_found_and_not_overstated():
    found = simulate(3, (0.02, 0.006, 0.02), effect=0.04, times=200)
    assert np.mean([d.told and d.mean > 0 for d in found]) > 0.9
    assert np.mean([d.mean for d in found]) == pytest.approx(0.04, abs=0.003)
    small = simulate(3, (0.02, 0.006, 0.02), effect=0.01, times=200)
    assert np.mean([d.told for d in small]) < 0.5


def test_pairing_beats_not_pairing():
    """Subjects differ far more from each other than two networks do on one of them."""
    random = np.random.default_rng(2)
    hard = 0.1 * random.standard_normal((1, 8, 1))
    first, second = (0.8 + hard + 0.01 * random.standard_normal((3, 8, 1)) for _ in range(2))
    paired = mean_difference(second + 0.03 - first, SUBJECTS)
    alone = [mean_difference(arm, SUBJECTS) for arm in (first, second + 0.03)]
    unpaired = math.hypot(*(arm.high - arm.low for arm in alone))
    assert paired.told
    assert paired.high - paired.low < unpaired / 5


def test_without_seeds_and_holes_the_spread_is_that_of_the_t_interval():
    table = np.random.default_rng(0).standard_normal((1, 200, 1))
    found = mean_difference(table, [str(n) for n in range(200)])
    half = 1.972 * table.std(ddof=1) / math.sqrt(200)
    assert found.mean == pytest.approx(table.mean())
    assert found.high - found.low == pytest.approx(2 * half, rel=0.1)


def test_holes_leave_an_organ_out_of_its_own_mean_only():
    table = np.zeros((1, 4, 3))
    table[..., 0], table[..., 1], table[..., 2] = 0.1, 0.3, np.nan
    table[0, :3, 1] = np.nan
    found = mean_difference(table, list("abcd"))
    assert (found.mean, found.low, found.high) == pytest.approx((0.2, 0.2, 0.2))
    table = draw(np.random.default_rng(0), 2, (1, 1, 1))
    absent = np.concatenate([table, np.full((2, 1, 2), np.nan)], axis=1)  # a subject without any organ
    with_it, without = mean_difference(absent, [*SUBJECTS, "none"]), mean_difference(table, SUBJECTS)
    for bound in ("mean", "low", "high"):
        assert getattr(with_it, bound) == pytest.approx(getattr(without, bound), rel=1e-12)
    influence, _ = statistics._influence(draw(np.random.default_rng(0), 2, (1, 1, 1)), SUBJECTS)
    assert influence.shape == (8, 2)
    assert influence.mean() == pytest.approx(0)


def test_two_scans_of_a_subject_are_one_observation():
    table = np.random.default_rng(0).standard_normal((2, 6, 1))
    twice = mean_difference(np.repeat(table, 2, axis=1), [name for name in "abcdef" for _ in range(2)])
    once = mean_difference(table, list("abcdef"))
    assert (twice.mean, twice.low, twice.high) == pytest.approx((once.mean, once.low, once.high))


def test_what_cannot_be_told_is_said():
    zeros = np.zeros((2, 2, 1))
    assert mean_difference(zeros, ["a", "b"]).words() == "no interval for +0.000: fewer than 3 subjects"
    assert mean_difference(zeros + np.nan, ["a", "b"]).words() == "not measured in both"
    same = mean_difference(np.zeros((2, 3, 1)), list("abc"))
    assert same.words() == "no difference can be told: +0.000 [+0.000, +0.000]"
    assert Difference(-0.02, -0.03, -0.01).words() == "worse by 0.020 [0.010, 0.030]"


def test_a_stricter_level_is_a_wider_interval():
    table = draw(np.random.default_rng(0), 3, (0.02, 0.006, 0.02))
    found = [mean_difference(table, SUBJECTS, level=level) for level in (0.8, 0.95, 0.99)]
    widths = [one.high - one.low for one in found]
    assert widths == sorted(widths)


def test_means_are_those_of_the_pairs():
    first = np.array([[[0.5], [np.nan], [0.7]]])
    second = np.array([[[0.6], [0.9], [np.nan]]])
    assert paired_means(first, second) == pytest.approx((0.5, 0.6))
