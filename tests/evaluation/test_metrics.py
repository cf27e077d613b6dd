"""Metrics per organ: values against MONAI and closed forms, and what happens with empty masks."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from unetrkit.data.plan import LabelClass
from unetrkit.evaluation import metrics
from unetrkit.evaluation.metrics import OrganMetrics, case_metrics, dice_scores, joint_counts

CLASSES = [LabelClass(id=0, name="background"), *(LabelClass(id=i, name=f"organ {i}") for i in (1, 3, 700))]
SPACING = (0.8, 0.8, 3.0)


def labels(seed: int, shape: tuple[int, int, int] = (26, 22, 14)) -> tuple[np.ndarray, np.ndarray]:
    """A label map with ids 1, 3 and 700, and one that is wrong here and there."""
    rng = np.random.default_rng(seed)
    fields = np.stack([ndimage.gaussian_filter(rng.normal(size=shape), 3.0) for _ in range(4)])
    noise = np.stack([ndimage.gaussian_filter(rng.normal(size=shape), 1.5) for _ in range(4)])
    noise *= fields.std() / noise.std()
    ids = np.array([0, 1, 3, 700], np.uint16)
    return ids[fields.argmax(axis=0)], ids[(fields + 0.5 * noise).argmax(axis=0)]


def only(organs: list[OrganMetrics]) -> OrganMetrics:
    [organ] = organs
    return organ


@pytest.mark.parametrize("seed", range(4))
def test_case_metrics_equal_monai(seed: int) -> None:
    import torch
    from monai.metrics import DiceMetric, MeanIoU, compute_hausdorff_distance, compute_surface_dice

    truth, prediction = labels(seed)
    t, p = (
        torch.stack([torch.from_numpy(m == i) for i in (1, 3, 700)])[None].float()
        for m in (truth, prediction)
    )
    options = {"include_background": True, "spacing": list(SPACING)}
    dice = DiceMetric(include_background=True)(p, t)[0].tolist()
    iou = MeanIoU(include_background=True)(p, t)[0].tolist()
    hd95 = compute_hausdorff_distance(p, t, percentile=95, **options)[0].tolist()
    nsd = compute_surface_dice(p, t, class_thresholds=[1.0] * 3, **options)[0].tolist()
    found = case_metrics(truth, prediction, SPACING, CLASSES, tolerance_mm=1.0)
    assert [o.id for o in found] == [1, 3, 700]
    assert [o.dice for o in found] == pytest.approx(dice, abs=1e-6)
    assert [o.iou for o in found] == pytest.approx(iou, abs=1e-6)
    assert [o.hd95_mm for o in found] == pytest.approx(hd95, abs=1e-4)
    assert [o.nsd for o in found] == pytest.approx(nsd, abs=1e-4)


def test_a_shifted_box_has_its_closed_form() -> None:
    truth = np.zeros((20, 20, 20), np.uint8)
    truth[4:12, 5:11, 6:16] = 1
    organ = only(case_metrics(truth, np.roll(truth, 2, axis=0), (2.0, 1.0, 0.5), CLASSES[:2]))
    assert organ.dice == 2 * 6 / (8 + 8)
    assert organ.iou == 6 / 10
    assert organ.hd95_mm == 4.0  # the leading face, 2 voxels of 2 mm
    assert organ.truth_ml == organ.prediction_ml == pytest.approx(8 * 6 * 10 / 1000)


def test_balls_have_the_dice_of_their_volumes() -> None:
    distance = np.sqrt(sum((a - 40.0) ** 2 for a in np.ogrid[:81, :81, :81]))
    truth, prediction = ((distance <= r).astype(np.uint8) for r in (36, 30))
    organ = only(case_metrics(truth, prediction, (1, 1, 1), CLASSES[:2]))
    assert organ.dice == pytest.approx(2 * 30**3 / (36**3 + 30**3), abs=2e-3)
    assert organ.iou == pytest.approx((30 / 36) ** 3, abs=2e-3)
    assert organ.truth_ml == pytest.approx(4 / 3 * np.pi * 36**3 / 1000, rel=2e-3)
    assert organ.assd_mm == pytest.approx(6.0, abs=0.3)


@pytest.mark.parametrize(
    ("in_truth", "in_prediction", "status", "overlap"),
    [
        (True, True, "scored", 1.0),
        (True, False, "missed", 0.0),
        (False, True, "false positive", 0.0),
        (False, False, "absent", None),
    ],
)
def test_absent_organs_follow_the_policy(
    in_truth: bool, in_prediction: bool, status: str, overlap: float | None
) -> None:
    masks = np.zeros((2, 6, 6, 6), np.uint8)
    masks[0, 2:4, 2:4, 2:4], masks[1, 2:4, 2:4, 2:4] = in_truth, in_prediction
    organ = only(case_metrics(*masks, (5, 5, 5), CLASSES[:2]))
    distance = 0.0 if status == "scored" else None
    expected = (overlap, overlap, overlap, distance, distance, in_truth * 1.0, in_prediction * 1.0)
    assert organ == OrganMetrics(1, "organ 1", status, *expected)  # type: ignore[arg-type]
    assert dice_scores(*masks, [1]) == {1: overlap}


@pytest.mark.parametrize("seed", range(3))
def test_dice_scores_equal_case_metrics(seed: int) -> None:
    truth, prediction = labels(seed)
    prediction[prediction == 3] = 0
    expected = {o.id: o.dice for o in case_metrics(truth, prediction, SPACING, CLASSES)}
    assert dice_scores(truth, prediction, [1, 3, 700]) == expected


def test_ids_that_are_no_class_count_as_background() -> None:
    truth, prediction = labels(0)
    wanted = dice_scores(truth, prediction, [1])
    truth[truth == 700], prediction[prediction == 3] = 5, 60000
    assert dice_scores(truth, prediction, [1]) == wanted
    assert only(case_metrics(truth, prediction, SPACING, CLASSES[:2])).dice == wanted[1]


def test_joint_counts_are_the_same_slab_by_slab(monkeypatch: pytest.MonkeyPatch) -> None:
    truth, prediction = labels(2)
    whole = joint_counts(truth, prediction, [1, 3, 700])
    monkeypatch.setattr(metrics, "SLAB_VOXELS", 3 * truth[:1].size)
    assert (joint_counts(truth, prediction, [1, 3, 700]) == whole).all()
    assert whole.sum() == truth.size
    assert whole[2, 3] == ((truth == 3) & (prediction == 700)).sum()


def test_a_tolerance_may_be_given_per_organ() -> None:
    truth, prediction = labels(1)
    loose, strict = (case_metrics(truth, prediction, SPACING, CLASSES, t) for t in (3.0, 0.5))
    mixed = case_metrics(truth, prediction, SPACING, CLASSES, {1: 3.0, 3: 0.5})
    default = case_metrics(truth, prediction, SPACING, CLASSES)
    assert [o.nsd for o in mixed] == [loose[0].nsd, strict[1].nsd, default[2].nsd]
    assert loose[0].nsd > default[0].nsd > strict[0].nsd  # type: ignore[operator]


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="shape"):
        dice_scores(np.zeros((2, 2, 2), np.uint8), np.zeros((2, 2, 3), np.uint8), [1])
