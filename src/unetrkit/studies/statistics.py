"""Whether one way of training is better than another: paired differences, their interval, and words for it.

A difference belongs to a subject and to a seed, and both are drawn anew: another hospital has other patients,
another user another seed. Subjects and seeds are crossed (Owen, "The pigeonhole bootstrap", 2007). The plain
percentile interval of so few is too short, so that it is stretched to the standard error of the two-way table
(as in reader studies: Hillis, "A comparison of denominator degrees of freedom methods for multiple observer
ROC analysis", 2007) and to Student's t instead of the normal distribution.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from unetrkit.evaluation.bootstrap import LEVEL, nan_mean
from unetrkit.evaluation.summary import FEWEST

# of subjects and seeds; many, for an interval that allows for many comparisons looks far into the tails
RESAMPLES = 20_000


@dataclass(frozen=True)
class Difference:
    """A mean difference of Dice and the interval for it; NaN where it is not defined."""

    mean: float
    low: float
    high: float

    @property
    def told(self) -> bool:
        """Whether a difference can be told: the interval does not hold zero."""
        return self.low > 0 or self.high < 0

    def words(self) -> str:
        """The verdict.

        >>> Difference(0.021, 0.004, 0.040).words()
        'better by 0.021 [0.004, 0.040]'
        """
        if math.isnan(self.mean):
            return "not measured in both"
        if math.isnan(self.low):
            return f"no interval for {self.mean:+.3f}: fewer than {FEWEST} subjects"
        if self.told:
            low, high = sorted(map(abs, (self.low, self.high)))
            return f"{'better' if self.mean > 0 else 'worse'} by {abs(self.mean):.3f} [{low:.3f}, {high:.3f}]"
        return f"no difference can be told: {self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def mean_difference(
    differences: np.ndarray, subjects: Sequence[str], *, level: float = LEVEL, seed: int = 0
) -> Difference:
    """The mean of paired differences (seeds, cases, organs), NaN where undefined, and its interval.

    The mean is that over organs of each organ's mean over seeds and cases; an organ that is defined nowhere
    is left out. With one seed the interval says nothing of how another seed would have come out. There is no
    interval for fewer than 3 subjects.
    """
    influence, mean = _influence(differences, subjects)
    if math.isnan(mean) or len(influence) < FEWEST:
        return Difference(mean, math.nan, math.nan)
    variance, freedom = _variance_of_mean(influence)
    if variance < 1e-20:  # the same everywhere, up to rounding
        return Difference(mean, mean, mean)
    count, seeds = influence.shape
    random = np.random.default_rng(seed)
    drawn, sown = (random.multinomial(n, np.full(n, 1 / n), size=RESAMPLES) / n for n in (count, seeds))
    resampled = ((drawn @ influence) * sown).sum(axis=1)
    tail = (1 - level) / 2
    # what the percentiles of a normal sample of this spread would be, and what they ought to be
    stretch = stats.t.isf(tail, freedom) * math.sqrt(variance) / (stats.norm.isf(tail) * resampled.std())
    low, high = stretch * np.percentile(resampled, [100 * tail, 100 * (1 - tail)])
    return Difference(mean, mean + float(low), mean + float(high))


def _influence(differences: np.ndarray, subjects: Sequence[str]) -> tuple[np.ndarray, float]:
    """What each subject and seed adds to the mean of means, (subjects, seeds), of mean 0; and that mean.

    With every value defined it is the table of differences without their mean. Undefined values leave holes
    in some organs' means: to first order (the infinitesimal jackknife) their neighbours weigh more.
    """
    names, rows = np.unique(np.asarray(subjects), return_inverse=True)
    defined = ~np.isnan(differences)
    measured = defined.any(axis=(0, 1))
    if not measured.any():
        return np.zeros((0, 0)), math.nan
    differences, defined = differences[..., measured], defined[..., measured]
    counts = defined.sum(axis=(0, 1))
    means = np.where(defined, differences, 0).sum(axis=(0, 1)) / counts
    present = np.zeros(len(names), bool)
    np.logical_or.at(present, rows, defined.any(axis=(0, 2)))
    cells = present.sum() * len(differences)
    deviations = np.where(defined, differences - means, 0) * (cells / counts)  # seeds cases organs
    table = np.zeros((len(names), len(differences)))
    np.add.at(table, rows, deviations.mean(axis=2).T)
    return table[present], float(means.mean())


def _variance_of_mean(table: np.ndarray) -> tuple[float, float]:
    """Variance of the mean of a table (subjects, seeds) with both drawn anew, and its degrees of freedom.

    Mean squares of a two-way layout: what seeds add beyond chance is added to what subjects do. The degrees
    of freedom are Satterthwaite's approximation.
    """
    subjects, seeds = table.shape
    of_subject = table.mean(axis=1, keepdims=True) - table.mean()
    of_seed = table.mean(axis=0, keepdims=True) - table.mean()
    square = seeds * float((of_subject**2).sum()) / (subjects - 1)
    if seeds == 1:
        return square / subjects, subjects - 1
    rest = (subjects - 1) * (seeds - 1)
    chance = float(((table - table.mean() - of_subject - of_seed) ** 2).sum()) / rest
    of_seeds = subjects * float((of_seed**2).sum()) / (seeds - 1)
    total, spread = square, square**2 / (subjects - 1)
    if of_seeds > chance:
        total += of_seeds - chance
        spread += of_seeds**2 / (seeds - 1) + chance**2 / rest
    freedom = max(total**2 / spread, 1.0) if spread > 0 else 1.0
    return total / (subjects * seeds), freedom


def paired_means(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """Mean Dice of two arms (seeds, cases, organs) where both are defined: means over organs of means."""
    both = ~(np.isnan(first) | np.isnan(second))
    means = [nan_mean(nan_mean(np.where(both, arm, np.nan), axis=0), axis=0) for arm in (first, second)]
    mean_first, mean_second = (float(nan_mean(m, axis=0)) for m in means)
    return mean_first, mean_second
