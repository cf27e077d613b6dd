"""Labels on the native grid: the naive way's, slice by slice."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from unetrkit.inference.restore import _neighbours, restore_slices


def slabs_of(scores, *widths):
    """(classes, x, y, z) cut along x."""
    start = 0
    for slab in scores.split(list(widths), 1):
        yield start, slab
        start += slab.shape[1]


def together(slices) -> torch.Tensor:
    at, planes = zip(*slices, strict=True)
    assert list(at) == list(range(len(at)))
    return torch.stack(planes).long()


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((40, 30, 20), (75, 64, 50)),
        ((40, 30, 20), (40, 30, 20)),
        ((40, 30, 20), (40, 61, 20)),
        ((60, 50, 40), (13, 25, 60)),  # thick native slices along x: planes are skipped
        ((1, 5, 5), (7, 9, 1)),
        ((5, 1, 1), (1, 1, 30)),
        ((37, 23, 11), (36, 24, 12)),
    ],
)
def test_labels_equal_the_naive_way(size, box):
    torch.manual_seed(3)
    scores = torch.randn(6, *size)
    naive = F.interpolate(scores[None], box, mode="trilinear", align_corners=False)[0].argmax(0)
    widths = [1] * size[0] if size[0] < 9 else [8, 1, size[0] - 9]
    ours = together(restore_slices(slabs_of(scores, *[w for w in widths if w]), size, box))
    assert ours.shape == naive.shape
    assert (ours == naive).double().mean() >= 0.99999


def test_the_neighbours_are_those_of_torch():
    for size, target in [(273, 512), (512, 273), (1, 4), (7, 7), (3, 1000)]:
        ramp = torch.arange(size, dtype=torch.float32)
        theirs = F.interpolate(ramp[None, None], target, mode="linear", align_corners=False)[0, 0]
        lower, weight = _neighbours(size, target)
        upper = np.minimum(np.asarray(lower) + 1, size - 1)
        ours = np.asarray(lower) * (1 - np.asarray(weight)) + upper * np.asarray(weight)
        assert np.abs(ours - theirs.numpy()).max() < 1e-4


def test_equal_scores_give_the_lower_class():
    assert together(restore_slices(slabs_of(torch.zeros(4, 3, 2, 2), 3), (3, 2, 2), (5, 4, 4))).max() == 0


def test_more_than_256_classes():
    scores = torch.zeros(300, 2, 2, 2)
    scores[299, 1] = 1
    assert together(restore_slices(slabs_of(scores, 2), (2, 2, 2), (2, 2, 2)))[1].unique().tolist() == [299]
