"""Confidence intervals of means by resampling subjects (Efron's percentile bootstrap)."""

from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95


def bootstrap_means(
    values: np.ndarray, subjects: Sequence[str], *, resamples: int = RESAMPLES, seed: int = 0
) -> np.ndarray:
    """Means over cases of resampled data: (cases, ...) -> (resamples, ...).

    Subjects are drawn with replacement, each with all of its cases: two scans of one patient are not two
    observations. NaN marks an undefined value and is left out of its mean; a resample that draws no defined
    value at all gives NaN.

    >>> means = bootstrap_means(np.array([0.0, 1.0]), ["a", "b"], resamples=1000)
    >>> sorted(set(means.tolist()))
    [0.0, 0.5, 1.0]
    """
    names, rows = np.unique(np.asarray(subjects), return_inverse=True)
    defined = ~np.isnan(values)
    sums = np.zeros((len(names), *values.shape[1:]))
    counts = np.zeros_like(sums)
    np.add.at(sums, rows, np.where(defined, values, 0.0))
    np.add.at(counts, rows, defined)
    chance = np.full(len(names), 1 / len(names))
    drawn = np.random.default_rng(seed).multinomial(len(names), chance, size=resamples)  # resamples subjects
    total, count = np.tensordot(drawn, sums, 1), np.tensordot(drawn, counts, 1)
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)


def nan_mean(values: np.ndarray, axis: int) -> np.ndarray:
    """The mean of what is defined; NaN, without a warning, where nothing is."""
    defined = ~np.isnan(values)
    count = np.asarray(defined.sum(axis))
    total = np.asarray(np.where(defined, values, 0.0).sum(axis))
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


def interval(means: np.ndarray, level: float = LEVEL) -> tuple[np.ndarray, np.ndarray]:
    """The central interval that holds `level` of the resampled means (axis 0), without the undefined."""
    undefined = np.isnan(means).all(axis=0)
    tail = 50 * (1 - level)
    low, high = np.nanpercentile(np.where(undefined, 0.0, means), [tail, 100 - tail], axis=0)
    return np.where(undefined, np.nan, low), np.where(undefined, np.nan, high)
