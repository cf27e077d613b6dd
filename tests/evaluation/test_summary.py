"""Means and their confidence intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from unetrkit.evaluation.bootstrap import bootstrap_means, interval, nan_mean
from unetrkit.evaluation.metrics import OrganMetrics, Status
from unetrkit.evaluation.summary import CaseMetrics, summarise


def organ(
    number: int, dice: float | None, status: Status = "scored", hd95: float | None = 1.0
) -> OrganMetrics:
    distance = hd95 if status == "scored" else None
    return OrganMetrics(number, f"organ {number}", status, dice, dice, dice, distance, distance, 2.0, 3.0)


def case(name: str, organs: Sequence[OrganMetrics], subject: str | None = None) -> CaseMetrics:
    return CaseMetrics(name, subject or name, tuple(organs))


def test_organs_weigh_the_same_however_often_they_are_there() -> None:
    absent = organ(2, None, "absent")
    cases = [case("a", [organ(1, 0.9), organ(2, 0.3)])]
    cases += [case(name, [organ(1, 0.9), absent]) for name in "bcde"]
    summary = summarise(cases)
    assert [o.estimates["dice"].mean for o in summary.organs] == pytest.approx([0.9, 0.3])
    assert [o.estimates["dice"].count for o in summary.organs] == [5, 1]
    assert [o.present for o in summary.organs] == [5, 1]
    assert summary.mean["dice"].mean == pytest.approx(0.6)  # of the cases' means it would be 0.84
    assert summary.mean["dice"].count == 2


def test_missed_and_false_positive_organs_are_counted_not_dropped() -> None:
    cases = [
        case("a", [organ(1, 0.8, hd95=4.0)]),
        case("b", [organ(1, 0.0, "missed")]),
        case("c", [organ(1, 0.0, "false positive")]),
        case("d", [organ(1, None, "absent")]),
    ]
    [found] = summarise(cases).organs
    assert (found.present, found.missed, found.false_positives, found.false_positive_ml) == (2, 1, 1, 3.0)
    assert found.estimates["dice"].mean == pytest.approx(0.8 / 3)
    assert found.estimates["hd95_mm"].mean == 4.0
    assert found.estimates["hd95_mm"].count == 1
    assert found.estimates["hd95_mm"].low is None  # one subject
    assert found.estimates["dice"].low == 0.0


def test_an_organ_that_is_nowhere_stays_out_of_the_mean() -> None:
    cases = [case(name, [organ(1, 0.5), organ(2, None, "absent")]) for name in "ab"]
    summary = summarise(cases)
    assert summary.organs[1].estimates["dice"].mean is None
    assert summary.mean["dice"].mean == 0.5
    assert summary.mean["dice"].count == 1
    assert "–" in summary.table().splitlines()[2]


def test_two_subjects_have_no_interval() -> None:
    scores = (("a", 0.5), ("b", 0.7))
    summary = summarise([case(name, [organ(1, score)], subject=name) for name, score in scores])
    assert summary.organs[0].estimates["dice"].low is summary.mean["dice"].low is None


def test_one_subject_has_no_interval() -> None:
    summary = summarise(
        [case(name, [organ(1, score)], subject="s") for name, score in (("a", 0.5), ("b", 0.7))]
    )
    estimate = summary.organs[0].estimates["dice"]
    assert (estimate.mean, estimate.low, estimate.high, estimate.count) == (pytest.approx(0.6), None, None, 2)
    assert summary.mean["dice"].low is None
    assert summary.subjects == 1


def test_the_same_seed_gives_the_same_interval() -> None:
    scores = np.random.default_rng(0).uniform(size=12)
    cases = [case(str(k), [organ(1, float(score))]) for k, score in enumerate(scores)]
    assert summarise(cases) == summarise(cases)
    assert summarise(cases, seed=1).mean != summarise(cases).mean


def test_bootstrap_means_equal_a_loop() -> None:
    rng = np.random.default_rng(5)
    values = rng.normal(size=(7, 2))
    values[3, 1] = np.nan
    subjects = ["a", "b", "b", "c", "d", "d", "d"]
    found = bootstrap_means(values, subjects, resamples=50, seed=3)
    drawn = np.random.default_rng(3).multinomial(4, [0.25] * 4, size=50)
    for times, means in zip(drawn, found, strict=True):
        cases = [k for k, s in enumerate(subjects) for _ in range(times["abcd".index(s)])]
        assert means == pytest.approx(np.nanmean(values[cases], axis=0))


def test_the_interval_has_the_normal_width() -> None:
    values = np.random.default_rng(2).normal(0.8, 0.1, size=400)
    low, high = interval(bootstrap_means(values, [str(k) for k in range(400)], resamples=4000))
    error = values.std() / 20
    assert float(high - low) == pytest.approx(2 * 1.96 * error, rel=0.06)
    assert float(low + high) / 2 == pytest.approx(values.mean(), abs=0.1 * error)


@pytest.mark.parametrize("scans", [1, 4])
def test_the_interval_covers_the_truth_as_often_as_it_says(scans: int) -> None:
    """Subjects differ (0.1), their scans hardly (0.02): resampling scans would cover half the time only."""
    rng = np.random.default_rng(7)
    subjects, repetitions = 30, 400
    of_subject = rng.normal(0.8, 0.1, size=(subjects, 1, repetitions))
    values = (of_subject + rng.normal(0, 0.02, size=(subjects, scans, repetitions))).reshape(-1, repetitions)
    by_subject = np.repeat([f"s{k}" for k in range(subjects)], scans).tolist()
    low, high = interval(bootstrap_means(values, by_subject, resamples=1000))
    assert 0.91 <= ((low <= 0.8) & (0.8 <= high)).mean() <= 0.97
    if scans > 1:
        low, high = interval(bootstrap_means(values, [str(k) for k in range(len(values))], resamples=1000))
        assert ((low <= 0.8) & (0.8 <= high)).mean() < 0.75


def test_nothing_defined_gives_nan_without_a_warning() -> None:
    nothing = np.full((3, 2), np.nan)
    assert np.isnan(nan_mean(nothing, axis=0)).all()
    means = bootstrap_means(nothing, ["a", "b", "c"], resamples=10)
    assert np.isnan(interval(means)).all()
