"""What a prediction is worth, organ by organ, on the case's own grid.

Where an organ is absent (`status`) overlaps are 0 if one of the masks has it, undefined if none has, and
distances undefined: None, never 0 or infinity. docs/metrics.md says how each is counted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import ndimage

from unetrkit.data.plan import LabelClass
from unetrkit.evaluation import surface

DEFAULT_TOLERANCE_MM = 2.0
METRICS = ("dice", "iou", "nsd", "hd95_mm", "assd_mm")
Status = Literal["scored", "missed", "false positive", "absent"]
STATUS: dict[tuple[bool, bool], Status] = {  # of an organ in the truth, in the prediction
    (True, True): "scored",
    (True, False): "missed",
    (False, True): "false positive",
    (False, False): "absent",
}
SLAB_VOXELS = 2**22


@dataclass(frozen=True)
class OrganMetrics:
    """One organ of one case; None where a metric is undefined (see the module)."""

    id: int
    name: str
    status: Status
    dice: float | None
    iou: float | None
    nsd: float | None
    hd95_mm: float | None
    assd_mm: float | None
    truth_ml: float
    prediction_ml: float


def case_metrics(
    truth: np.ndarray,
    prediction: np.ndarray,
    spacing: Sequence[float],
    classes: Sequence[LabelClass],
    tolerance_mm: float | Mapping[int, float] = DEFAULT_TOLERANCE_MM,
) -> list[OrganMetrics]:
    """Measure every class but the background (id 0) of one case, in the order of `classes`.

    `truth` and `prediction` are (x, y, z) integer arrays of label ids on one grid, voxels of `spacing` mm.
    Ids that are not among `classes` count as background. `tolerance_mm` is the tolerance of NSD, one for all
    or one per class id (2 mm where an id has none).

    >>> truth = np.zeros((8, 8, 8), np.uint8)
    >>> truth[2:6, 2:6, 2:6] = 7
    >>> [organ] = case_metrics(truth, np.roll(truth, 1, axis=2), (1, 1, 3), [LabelClass(id=7, name="cyst")])
    >>> organ.status, organ.dice, organ.iou, organ.hd95_mm, organ.truth_ml
    ('scored', 0.75, 0.6, 3.0, 0.192)
    """
    organs = [c for c in classes if c.id != 0]
    ids = [c.id for c in organs]
    tolerances = tolerance_mm if isinstance(tolerance_mm, Mapping) else dict.fromkeys(ids, tolerance_mm)
    joint = joint_counts(truth, prediction, ids)
    boxes = [ndimage.find_objects(_class_indices(labels, ids)) for labels in (truth, prediction)]
    voxel_ml = float(np.prod(spacing)) / 1000
    found = []
    for k, organ in enumerate(organs, start=1):
        both, in_truth, in_prediction = int(joint[k, k]), int(joint[k].sum()), int(joint[:, k].sum())
        status = STATUS[in_truth > 0, in_prediction > 0]
        dice, iou = _overlap(both, in_truth, in_prediction)
        nsd = None if status == "absent" else 0.0
        hd95 = assd = None
        if status == "scored":
            sides = zip(boxes[0][k - 1], boxes[1][k - 1], strict=True)
            box = tuple(slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in sides)
            masks = truth[box] == organ.id, prediction[box] == organ.id
            distances = surface.surface_distances(*masks, spacing)
            hd95, assd = surface.hausdorff_distance(distances), surface.average_distance(distances)
            nsd = surface.surface_dice(distances, tolerances.get(organ.id, DEFAULT_TOLERANCE_MM))
        volumes = in_truth * voxel_ml, in_prediction * voxel_ml
        found.append(OrganMetrics(organ.id, organ.name, status, dice, iou, nsd, hd95, assd, *volumes))
    return found


def dice_scores(truth: np.ndarray, prediction: np.ndarray, ids: Sequence[int]) -> dict[int, float | None]:
    """Dice of each id, cheap enough for every validation: one pass over the voxels, no surfaces.

    The same numbers and the same treatment of absent organs as `case_metrics`.

    >>> dice_scores(np.array([1, 1, 0, 0]), np.array([1, 0, 0, 3]), ids=[1, 2, 3])
    {1: 0.6666666666666666, 2: None, 3: 0.0}
    """
    joint = joint_counts(truth, prediction, ids)
    sums = zip(joint.diagonal(), joint.sum(axis=1), joint.sum(axis=0), strict=True)
    overlaps = [_overlap(int(both), int(t), int(p))[0] for both, t, p in sums]
    return dict(zip(ids, overlaps[1:], strict=True))


def joint_counts(truth: np.ndarray, prediction: np.ndarray, ids: Sequence[int]) -> np.ndarray:
    """Voxels per pair of labels, (1 + ids, 1 + ids): [i, j] is truth `ids[i - 1]` predicted as `ids[j - 1]`.

    Row and column 0 are everything that is not in `ids`.
    """
    if truth.shape != prediction.shape:
        raise ValueError(f"truth has shape {truth.shape}, prediction {prediction.shape}")
    size = len(ids) + 1
    counts = np.zeros(size * size, np.int64)
    # Slab by slab: np.bincount turns its input into int64, 8 bytes a voxel.
    step = max(1, SLAB_VOXELS // max(1, truth[:1].size))
    for start in range(0, len(truth), step):
        slab = slice(start, start + step)
        rows = _class_indices(truth[slab], ids).astype(np.int64)
        pairs = rows * size + _class_indices(prediction[slab], ids)
        counts += np.bincount(pairs.ravel(), minlength=size * size)
    return counts.reshape(size, size)


def _class_indices(labels: np.ndarray, ids: Sequence[int]) -> np.ndarray:
    """Label ids -> 1 + their position in `ids`, 0 for any other."""
    top = max(ids, default=0) + 1  # stands for every greater id
    table = np.zeros(top + 1, np.uint16)
    table[list(ids)] = np.arange(1, len(ids) + 1)
    return table[np.minimum(labels, top) if labels.size and labels.max() > top else labels]


def _overlap(both: int, in_truth: int, in_prediction: int) -> tuple[float | None, float | None]:
    """Dice and IoU; undefined where both masks are empty."""
    total = in_truth + in_prediction
    return (2 * both / total, both / (total - both)) if total else (None, None)
