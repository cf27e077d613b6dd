"""Corruptions against MONAI's given the same boxes, against plain loops, and by their statistics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from unetrkit.pretraining.corruptions import (
    Painting,
    add_noise,
    coarsen,
    draw_boxes,
    draw_turns,
    generator_of_step,
    paint,
    painted,
    shuffle,
    turn,
)

SIZES = [(96, 96, 96), (33, 20, 7), (1, 1, 1)]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def image(*shape: int) -> Tensor:
    return 10 + torch.rand(shape, generator=seeded(1))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("growing", [False, True])
def test_boxes_lie_within_the_crop_with_sides_of_the_range(size: tuple[int, int, int], growing: bool) -> None:
    shares = (0.052, 0.333)
    boxes = draw_boxes(seeded(), 300, size, shares, growing=growing)
    assert len(boxes) == 300
    for axis, extent in enumerate(size):
        sides = [box[axis].stop - box[axis].start for box in boxes]
        assert min(box[axis].start for box in boxes) == 0  # both ends are reached
        assert max(box[axis].stop for box in boxes) == extent
        assert min(sides) >= max(round(0.052 * extent), 1)
        assert max(sides) == max(round(0.333 * extent), 1)
        assert (sides == sorted(sides)) == (growing or extent == 1)


def test_shares_of_96_voxels_are_the_published_sides() -> None:
    for shares, least, most in (((0.052, 0.333), 5, 32), ((0.208, 0.667), 20, 64), ((0.083, 0.083), 8, 8)):
        boxes = draw_boxes(seeded(), 2000, (96, 96, 96), shares)
        sides = [s.stop - s.start for box in boxes for s in box]
        assert (min(sides), max(sides)) == (least, most)
        assert np.mean(sides) == pytest.approx((least + most) / 2, rel=0.01)


def test_growing_boxes_are_distributed_as_monai_draws_them() -> None:
    from monai.transforms import RandCoarseDropout

    theirs = RandCoarseDropout(
        prob=1.0, holes=6, spatial_size=5, max_spatial_size=32, fill_value=None
    ).set_random_state(0)
    sides: dict[str, list[list[int]]] = {"monai": [], "growing": [], "independent": []}
    generator = seeded()
    for _ in range(500):
        theirs.randomize((96, 96, 96))
        drawn = {"monai": [coordinates[1:] for coordinates in theirs.hole_coords]}
        for name in ("growing", "independent"):
            growing = name == "growing"
            drawn[name] = draw_boxes(generator, 6, (96, 96, 96), (0.052, 0.333), growing=growing)
        for name, boxes in drawn.items():
            sides[name].append([box[0].stop - box[0].start for box in boxes])
    mean = {name: np.mean(lengths, axis=0) for name, lengths in sides.items()}
    np.testing.assert_allclose(mean["growing"], mean["monai"], atol=1.2)
    assert mean["monai"][-1] > 31 and abs(mean["independent"][-1] - 18.5) < 1.2


@pytest.mark.parametrize("outside", [False, True])
def test_painting_equals_monai_in_the_same_boxes(outside: bool) -> None:
    from monai.transforms import RandCoarseDropout

    x = image(2, 2, 24, 17, 30)
    boxes = tuple(draw_boxes(seeded(i), 6, x.shape[2:], (0.1, 0.4)) for i in range(2))
    found = paint(Painting(boxes, (outside, outside), seed=3), x)
    for crop, own, result in zip(x, boxes, found, strict=True):
        theirs = RandCoarseDropout(prob=1.0, holes=6, spatial_size=3, dropout_holes=not outside)
        # else one of 20,000 voxels is painted with its own value, once in many runs
        theirs.set_random_state(0).randomize(crop.shape[1:])
        theirs.hole_coords = [(slice(None), *box) for box in own]
        expected = torch.as_tensor(theirs(crop.clone(), randomize=False))
        same = expected == crop
        assert torch.equal(result == crop, same)
        noise = result[~same]
        assert crop.min() <= noise.min() and noise.max() <= crop.max()
        middle = (crop.min() + crop.max()) / 2
        assert abs(noise.mean() - middle) < 0.05 and abs(noise.std() - 12**-0.5) < 0.02  # uniform
        assert abs(noise.mean() - expected[~same].mean()) < 0.05


def test_each_crop_is_painted_in_its_own_way_and_range() -> None:
    x = torch.cat((image(1, 1, 12, 12, 12), -image(1, 1, 12, 12, 12)))
    box = (slice(2, 8), slice(0, 3), slice(4, 12))
    found = paint(Painting(([box], [box]), (False, True), seed=0), x)
    inside = torch.zeros(12, 12, 12, dtype=torch.bool)
    inside[box] = True
    changed = (found != x)[:, 0]
    assert torch.equal(changed[0], inside) and torch.equal(changed[1], ~inside)
    assert (found[0] > 0).all() and (found[1] < 0).all()


def test_the_last_box_owns_a_voxel() -> None:
    boxes = draw_boxes(seeded(), 9, (10, 8, 6), (0.2, 0.7))
    expected = np.zeros((10, 8, 6))
    for place in np.ndindex(10, 8, 6):
        for number, box in enumerate(boxes, 1):
            if all(s.start <= i < s.stop for s, i in zip(box, place, strict=True)):
                expected[place] = number
    np.testing.assert_array_equal(painted(boxes, (10, 8, 6)), expected)


def test_shuffling_keeps_the_voxels_of_each_box_and_channel() -> None:
    x = image(2, 2, 20, 16, 12)
    apart = [(slice(0, 8), slice(0, 8), slice(0, 8)), (slice(10, 18), slice(4, 12), slice(4, 12))]
    found = shuffle([apart, []], 5, x)
    assert torch.equal(found[1], x[1])
    outside = torch.ones(20, 16, 12, dtype=torch.bool)
    for box in apart:
        outside[box] = False
        before, after = (t[0][(slice(None), *box)].flatten(1) for t in (x, found))
        assert torch.equal(before.sort(1).values, after.sort(1).values)
        assert ((before != after).float().mean(1) > 0.98).all()
        order = [a.argsort()[b.argsort().argsort()] for a, b in zip(before, after, strict=True)]
        assert not torch.equal(order[0], order[1])  # each channel by itself
    assert torch.equal(found[0][:, outside], x[0][:, outside])


def test_boxes_that_overlap_are_shuffled_one_after_the_other_as_by_monai() -> None:
    from monai.transforms import RandCoarseShuffle

    ramp = torch.arange(12.0).repeat(4, 1).t().reshape(1, 12, 4, 1)  # a value is where it came from
    boxes = [(slice(0, 8), slice(0, 4), slice(0, 1)), (slice(4, 12), slice(0, 4), slice(0, 1))]
    theirs = RandCoarseShuffle(prob=1.0, holes=2, spatial_size=1).set_random_state(0)
    theirs.hole_coords, theirs._do_transform = [(slice(None), *box) for box in boxes], True
    ours, others = [], []
    for seed in range(300):
        ours.append(shuffle([boxes], seed, ramp[None])[0])
        others.append(torch.as_tensor(theirs(ramp.clone(), randomize=False)))
    # from the first four rows into the last four: by way of the middle, in two steps
    for results in (ours, others):
        came = torch.stack(results)[:, :, 8:] < 4
        assert came.float().mean() == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize(("axis", "plane"), [(0, (1, 2)), (2, (0, 1))])
def test_turns_are_quarter_turns_about_the_axis(axis: int, plane: tuple[int, int]) -> None:
    x = image(4, 2, 6, 6, 6)
    found = turn([0, 1, 2, 3], axis, x)
    for k in range(4):
        expected = np.rot90(x[k].numpy(), k, tuple(place + 1 for place in plane))
        np.testing.assert_array_equal(found[k].numpy(), expected)


def test_turns_are_drawn_evenly_and_fit_the_crop() -> None:
    counts = np.bincount(draw_turns(seeded(), 4000, (6, 6, 9), 2), minlength=4)
    assert (abs(counts - 1000) < 100).all()
    counts = np.bincount(draw_turns(seeded(), 4000, (6, 6, 9), 0), minlength=4)
    assert counts[1] == counts[3] == 0 and abs(counts[0] - 2000) < 150
    x = image(3, 1, 6, 8, 5)
    for axis in (0, 2):
        assert turn(draw_turns(seeded(), 3, x.shape[2:], axis), axis, x).shape == x.shape


def test_noise_has_its_deviation_and_is_the_seeds() -> None:
    x = image(2, 1, 24, 24, 24)
    noise = add_noise(0.3, 1, x) - x
    assert abs(noise.mean()) < 0.01 and noise.std().item() == pytest.approx(0.3, rel=0.02)
    assert torch.equal(add_noise(0.3, 1, x), add_noise(0.3, 1, x))
    assert not torch.equal(add_noise(0.3, 1, x), add_noise(0.3, 2, x))


@pytest.mark.parametrize("size", [(16, 16, 16), (9, 6, 1)])
def test_coarse_voxels_are_the_nearest_kept_ones(size: tuple[int, int, int]) -> None:
    x = image(2, 2, *size)
    found = coarsen(4, x)
    for i, j, k in np.ndindex(*size):
        assert torch.equal(found[:, :, i, j, k], x[:, :, i // 4 * 4, j // 4 * 4, k // 4 * 4])
    if size == (16, 16, 16):
        down = F.interpolate(x, scale_factor=0.25, mode="nearest")
        assert torch.equal(found, F.interpolate(down, scale_factor=4, mode="nearest"))


@pytest.mark.parametrize("size", SIZES)
def test_every_corruption_keeps_shape_and_input(size: tuple[int, int, int]) -> None:
    x = image(2, 2, *size)
    kept = x.clone()
    boxes = tuple(draw_boxes(seeded(i), 4, size, (0.05, 0.3)) for i in range(2))
    for result in (
        paint(Painting(boxes, (False, True), 0), x),
        shuffle(boxes, 0, x),
        add_noise(1.0, 0, x),
        coarsen(4, x),
    ):
        assert result.shape == x.shape and result.isfinite().all()
    assert torch.equal(x, kept)


def test_a_step_has_a_generator_of_its_seed() -> None:
    torch.manual_seed(2**64 - 3)  # the loop's seeds have 64 bits
    one, other = (torch.rand(3, generator=generator_of_step()) for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(one, other)
    assert not torch.equal(one, torch.rand(3, generator=generator_of_step()))
