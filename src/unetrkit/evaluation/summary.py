"""From the metrics of every case to one figure per organ and one for the whole, with confidence intervals.

The mean of an organ is taken over the cases where the metric is defined; the mean over organs is the mean of
these means, so that a rare organ weighs as much as a common one. The interval of each resamples subjects.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unetrkit.evaluation import bootstrap
from unetrkit.evaluation.metrics import METRICS, OrganMetrics

FEWEST = 3  # subjects for an interval; that of two only repeats their two values


@dataclass(frozen=True)
class CaseMetrics:
    """All organs of one case, in the same order in every case."""

    name: str
    subject: str
    organs: tuple[OrganMetrics, ...]

    @property
    def dice(self) -> float | None:
        """Mean Dice over the organs where it is defined."""
        scores = [o.dice for o in self.organs if o.dice is not None]
        return sum(scores) / len(scores) if scores else None


@dataclass(frozen=True)
class Estimate:
    """A mean over `count` values and its 95 % interval; None where undefined (no interval of 2 subjects)."""

    mean: float | None
    low: float | None
    high: float | None
    count: int


@dataclass(frozen=True)
class OrganSummary:
    id: int
    name: str
    estimates: dict[str, Estimate]  # by the names in METRICS
    present: int  # cases whose truth has the organ
    missed: int
    false_positives: int
    false_positive_ml: float


@dataclass(frozen=True)
class Summary:
    """`mean` holds the means over organs; its counts are numbers of organs."""

    organs: tuple[OrganSummary, ...]
    mean: dict[str, Estimate]
    cases: tuple[CaseMetrics, ...]
    subjects: int
    notes: tuple[str, ...] = ()  # what a reader of the figures must know

    def worst_first(self) -> list[CaseMetrics]:
        """The cases that have a Dice, from the lowest mean Dice on."""
        return sorted((c for c in self.cases if c.dice is not None), key=lambda case: case.dice or 0.0)

    def table(self) -> str:
        """The figures for a terminal: a line per organ, the mean, and the notes."""
        width = max(len(name) for name in ["mean", *(organ.name for organ in self.organs)])
        lines = [
            f"{'organ':{width}} {'cases':>6} {'Dice':>6} {'IoU':>6} {'NSD':>6} {'HD95 mm':>8} {'ASSD mm':>8} "
            f"{'missed':>7} {'false positive':>15}"
        ]
        missed, false = (sum(getattr(o, n) for o in self.organs) for n in ("missed", "false_positives"))
        rows = [(o.name, o.present, o.estimates, o.missed, o.false_positives) for o in self.organs]
        for name, count, estimates, m, f in [*rows, ("mean", len(self.cases), self.mean, missed, false)]:
            lines.append(f"{name:{width}} {count:6} {_row(estimates)} {m:7} {f:15}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def summarise(
    cases: Sequence[CaseMetrics], *, resamples: int = bootstrap.RESAMPLES, seed: int = 0
) -> Summary:
    """Summarise one or more cases that were measured with the same classes."""
    subjects = [case.subject for case in cases]
    values = [[[getattr(o, m) for m in METRICS] for o in case.organs] for case in cases]
    table = np.array(values, float).reshape(len(cases), -1, len(METRICS))  # NaN for None
    means = bootstrap.nan_mean(table, axis=0)
    resampled = bootstrap.bootstrap_means(table, subjects, resamples=resamples, seed=seed)
    low, high = bootstrap.interval(resampled)
    defined = ~np.isnan(table)
    counts = defined.sum(axis=0)
    names, rows = np.unique(np.asarray(subjects), return_inverse=True)
    alone = sum(defined[rows == k].any(axis=0).astype(int) for k in range(len(names))) < FEWEST
    low[alone] = high[alone] = np.nan

    organs = []
    for k, organ in enumerate(cases[0].organs):
        found = [case.organs[k] for case in cases]
        false_positives = [o.prediction_ml for o in found if o.status == "false positive"]
        estimates = _estimates(means[k], low[k], high[k], counts[k])
        status = Counter(o.status for o in found)
        present, missed = status["scored"] + status["missed"], status["missed"]
        wrong = len(false_positives), sum(false_positives)
        organs.append(OrganSummary(organ.id, organ.name, estimates, present, missed, *wrong))
    overall_low, overall_high = bootstrap.interval(bootstrap.nan_mean(resampled, axis=1))
    if len(set(subjects)) < FEWEST:
        overall_low[:] = overall_high[:] = np.nan
    measured = (counts > 0).sum(axis=0)
    overall = _estimates(bootstrap.nan_mean(means, axis=0), overall_low, overall_high, measured)
    return Summary(tuple(organs), overall, tuple(cases), len(set(subjects)))


def _estimates(*columns: np.ndarray) -> dict[str, Estimate]:
    rows = zip(METRICS, *columns, strict=True)  # name, mean, low, high, count
    return {metric: Estimate(_number(m), _number(a), _number(b), int(n)) for metric, m, a, b, n in rows}


def _row(estimates: dict[str, Estimate]) -> str:
    shares = [f"{m:6.3f}" if (m := estimates[n].mean) is not None else f"{'–':>6}" for n in METRICS[:3]]
    distances = [f"{m:8.2f}" if (m := estimates[n].mean) is not None else f"{'–':>8}" for n in METRICS[3:]]
    return " ".join(shares + distances)


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
