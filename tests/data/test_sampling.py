from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from scipy.stats import chi2_contingency, chisquare
from tests.data.small_store import MemoryCase, small_plan

from unetrkit.data.plan import Intensity
from unetrkit.data.sampling import SamplingSettings, case_at, draw_corner, generator_for, read_patch

DRAWS = 3000


def two_organs(shape=(9, 8, 7)):
    classes = np.zeros(shape, np.uint8)
    classes[1:3, 5:8, 2:5] = 1  # 18 voxels, at an edge
    classes[6:9, 0:4, 3:6] = 3  # 36 voxels, in a corner
    image = np.arange(classes.size, dtype=np.float32).reshape(1, *shape)
    return MemoryCase(image, classes)


def corners(case, size, settings, draws=DRAWS):
    return [draw_corner(generator_for(0, n), case, size, settings) for n in range(draws)]


def monai_corners(case, size, foreground):
    from monai.transforms import RandCropByPosNegLabeld

    crop = RandCropByPosNegLabeld(
        ["image"], label_key="label", spatial_size=size, pos=foreground, neg=1 - foreground, num_samples=DRAWS
    ).set_random_state(1)
    both = {"image": torch.from_numpy(case.voxels), "label": torch.from_numpy(case.classes[None])}
    first = [int(patch["image"][0, 0, 0, 0]) for patch in crop(both)]
    return list(zip(*(axis.tolist() for axis in np.unravel_index(first, case.shape)), strict=True))


@pytest.mark.parametrize("size", [(4, 4, 4), (5, 3, 4), (9, 2, 7)])
@pytest.mark.parametrize("foreground", [0.5, 0.8])
def test_corners_follow_monai_distribution(size, foreground):
    case = two_organs()
    ours = Counter(corners(case, size, SamplingSettings(foreground=foreground)))
    theirs = Counter(monai_corners(case, size, foreground))
    assert set(ours) | set(theirs) <= set(
        np.ndindex(*(n - s + 1 for n, s in zip(case.shape, size, strict=True)))
    )
    # corners that are rare in both are counted together, as the test requires
    common = [c for c in ours | theirs if ours[c] + theirs[c] >= 20]
    table = [[counts[c] for c in common] for counts in (ours, theirs)]
    for row, counts in zip(table, (ours, theirs), strict=True):
        row.append(DRAWS - sum(counts[c] for c in common) + 1)
    assert len(common) > 5
    assert chi2_contingency(table).pvalue > 0.01


def test_corners_follow_exact_distribution():
    case, size = two_organs(), (4, 5, 3)
    expected = np.zeros([n - s + 1 for n, s in zip(case.shape, size, strict=True)])
    foreground = int((case.classes > 0).sum())
    for centre in np.ndindex(*case.shape):
        corner = tuple(
            min(max(c - s // 2, 0), n - s) for c, s, n in zip(centre, size, case.shape, strict=True)
        )
        inside = case.classes[centre] > 0
        expected[corner] += 0.5 / foreground if inside else 0.5 / (case.classes.size - foreground)
    seen = np.zeros_like(expected)
    for corner in corners(case, size, SamplingSettings()):
        seen[corner] += 1
    assert chisquare(seen.ravel(), expected.ravel() * DRAWS).pvalue > 0.01


@pytest.mark.parametrize(("balanced", "share"), [(False, 18 / 54), (True, 1 / 2)])
def test_foreground_centres_are_shared_among_classes(balanced, share):
    case = two_organs()
    settings = SamplingSettings(foreground=1.0, class_balanced=balanced)
    # patches of one voxel: the corner is the centre
    drawn = Counter(int(case.classes[c]) for c in corners(case, (1, 1, 1), settings))
    assert set(drawn) == {1, 3}
    assert drawn[1] / DRAWS == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize(("fill", "foreground"), [(0, 1.0), (2, 0.0)])
def test_case_without_the_wanted_side_falls_back(fill, foreground):
    case = MemoryCase(np.zeros((1, 6, 6, 6), np.float32), np.full((6, 6, 6), fill, np.uint8))
    drawn = corners(case, (1, 1, 1), SamplingSettings(foreground=foreground), draws=100)
    assert len(set(drawn)) > 50


def test_every_pass_holds_every_case_once_in_another_order():
    passes = [[case_at(3, 7 * n + i, 7) for i in range(7)] for n in range(50)]
    assert all(sorted(order) == list(range(7)) for order in passes)
    assert len({tuple(order) for order in passes}) > 45
    assert passes != [[case_at(4, 7 * n + i, 7) for i in range(7)] for n in range(50)]


def test_generators_are_a_fixed_function_of_their_counters():
    # a recipe's batches must not change from one release to the next: a change here is a new version
    assert torch.randint(1000, (4,), generator=generator_for(0, 7, 1, 2)).tolist() == [454, 773, 745, 317]
    seeds = {
        generator_for(s, step, i).initial_seed() for s in range(3) for step in range(100) for i in range(9)
    }
    assert len(seeds) == 2700
    assert generator_for(1, 2).initial_seed() != generator_for(1, 2, 0).initial_seed()


def test_patch_is_read_where_the_corner_says_and_nothing_else():
    case = two_organs()
    image, label = read_patch(case, (3, 0, 2), (4, 5, 3), small_plan().intensity)
    assert case.reads == [((3, 0, 2), (4, 5, 3))]
    assert np.array_equal(image, case.voxels[:, 3:7, 0:5, 2:5])
    assert np.array_equal(label, case.classes[3:7, 0:5, 2:5])


@pytest.mark.parametrize("kind", ["window", "zscore"])
def test_volume_smaller_than_patch_is_centred_in_air(kind):
    case = two_organs()
    voxels = case.voxels.astype(np.float16) / 100 - 1
    case = MemoryCase(np.concatenate([voxels, voxels + 1]), case.classes)
    size = (12, 4, 10)
    corner = draw_corner(generator_for(0), case, size, SamplingSettings())
    assert corner[0] == -1 and 0 <= corner[1] <= 4 and corner[2] == -1
    image, label = read_patch(case, corner, size, (Intensity(kind=kind, lower=0.5, upper=99.5),) * 2)
    assert image.shape == (2, *size) and image.dtype == torch.float16 and label.shape == size
    assert case.reads == [((0, corner[1], 0), (9, 4, 7))]
    inside = case.voxels[:, :, corner[1] : corner[1] + 4]
    assert np.array_equal(image[:, 1:10, :, 1:8], inside)
    outside = torch.ones(size, dtype=torch.bool)
    outside[1:10, :, 1:8] = False
    assert label[outside].eq(0).all()
    for channel in range(2):
        air = 0.0 if kind == "window" else float(inside[channel].min())
        assert image[channel][outside].eq(air).all()
