"""Distances between the surfaces of two masks, in millimetres: HD95, ASSD and surface Dice (NSD).

A mask's surface is its boundary voxels, each with the same weight; docs/metrics.md defines the figures and
says with whose they may be compared. NSD: Nikolov et al., https://arxiv.org/abs/1809.04430
"""

from collections.abc import Sequence

import numpy as np
from scipy.spatial import KDTree

# A header keeps spacings in float32: five voxels of 0.4 mm are then 2.00000003 mm and must be within 2 mm.
ROUNDING_MM = 1e-4


def boundary(mask: np.ndarray) -> np.ndarray:
    """The boundary voxels of a boolean mask of any dimension; of an empty mask, none.

    >>> boundary(np.ones((3, 3), bool)).astype(int)
    array([[1, 1, 1],
           [1, 0, 1],
           [1, 1, 1]])
    """
    padded = np.pad(mask, 1)
    interior = mask.copy()
    for axis in range(mask.ndim):
        for start in (0, 2):
            window = [slice(1, -1)] * mask.ndim
            window[axis] = slice(start, start + mask.shape[axis])
            interior &= padded[tuple(window)]
    return mask & ~interior


def surface_distances(
    truth: np.ndarray, prediction: np.ndarray, spacing: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Distances (mm) of truth's boundary voxels to the prediction's surface, and the other way round.

    Both masks are boolean, (x, y, z), on one grid, and neither is empty: an empty mask has no surface.

    A tree over the boundary voxels gives the same distances as a distance transform of the bounding box, 6
    times sooner for a liver (0.11 s against 0.64 s on 178 x 176 x 57); a far false positive costs nothing.
    Not a balanced tree: on a grid's many equal coordinates that is 2.5 times slower for a noisy mask.

    >>> a, b = np.zeros((1, 1, 9), bool), np.zeros((1, 1, 9), bool)
    >>> a[0, 0, 0] = b[0, 0, 4] = True
    >>> surface_distances(a, b, (1.0, 1.0, 2.5))
    (array([10.]), array([10.]))
    """
    assert truth.any() and prediction.any(), "distances need two masks that are not empty"
    box = bounding_box(truth | prediction)
    points = [np.argwhere(boundary(mask[box])) * np.asarray(spacing, float) for mask in (truth, prediction)]
    trees = [KDTree(p, leafsize=32, balanced_tree=False, compact_nodes=False) for p in points]
    to_prediction, to_truth = (trees[1 - k].query(points[k])[0] for k in (0, 1))
    return np.asarray(to_prediction), np.asarray(to_truth)


def bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    """The smallest box around the True voxels of a mask that has some."""
    box = []
    for axis in range(mask.ndim):
        filled = np.flatnonzero(mask.any(axis=tuple(a for a in range(mask.ndim) if a != axis)))
        box.append(slice(int(filled[0]), int(filled[-1]) + 1))
    return tuple(box)


def hausdorff_distance(distances: tuple[np.ndarray, np.ndarray], percentile: float = 95.0) -> float:
    """The larger of the two directed percentiles, mm; 100 gives the Hausdorff distance itself."""
    return float(max(np.percentile(directed, percentile) for directed in distances))


def average_distance(distances: tuple[np.ndarray, np.ndarray]) -> float:
    """Average symmetric surface distance (ASSD), mm."""
    return float(np.concatenate(distances).mean())


def surface_dice(distances: tuple[np.ndarray, np.ndarray], tolerance_mm: float) -> float:
    """Normalised surface Dice (NSD), 0 to 1: the share of both surfaces within `tolerance_mm`."""
    return float((np.concatenate(distances) <= tolerance_mm + ROUNDING_MM).mean())
