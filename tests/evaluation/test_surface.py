"""Surface distances against closed forms, a banal loop, a distance transform and MONAI."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import ndimage

from unetrkit.evaluation import surface

SPACINGS = [(1.0, 1.0, 1.0), (0.8, 0.8, 3.0), (2.5, 1.25, 0.7)]


def ball(
    radius: float, centre: tuple[float, ...], spacing: tuple[float, ...], shape: tuple[int, ...]
) -> np.ndarray:
    axes = np.ogrid[tuple(slice(n) for n in shape)]
    return sum((a * s - c) ** 2 for a, s, c in zip(axes, spacing, centre, strict=True)) <= radius**2


def blobs(seed: int, shape: tuple[int, int, int] = (24, 20, 16)) -> tuple[np.ndarray, np.ndarray]:
    """Two ragged masks that touch the border of the volume, some in several pieces."""
    rng = np.random.default_rng(seed)
    field = ndimage.gaussian_filter(rng.normal(size=shape), 2.0)
    other = field + 0.5 * field.std() * ndimage.gaussian_filter(rng.normal(size=shape), 1.0)
    return field > 0.5 * field.std(), other > 0.6 * field.std()


def box(start: tuple[int, ...], stop: tuple[int, ...], shape: tuple[int, ...] = (30, 30, 30)) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))] = True
    return mask


def banal_distances(
    truth: np.ndarray, prediction: np.ndarray, spacing: tuple[float, ...]
) -> list[list[float]]:
    """The definition, voxel by voxel."""
    surfaces = []
    for mask in (truth, prediction):
        points = []
        for voxel in itertools.product(*map(range, mask.shape)):
            neighbours = [
                tuple(v + (step if a == axis else 0) for a, v in enumerate(voxel))
                for axis in range(3)
                for step in (-1, 1)
            ]
            inside = [
                all(0 <= v < n for v, n in zip(p, mask.shape, strict=True)) and mask[p] for p in neighbours
            ]
            if mask[voxel] and not all(inside):
                points.append(np.array(voxel) * spacing)
        surfaces.append(points)
    a, b = surfaces
    return [
        [min(float(np.linalg.norm(p - q)) for q in other) for p in one] for one, other in ((a, b), (b, a))
    ]


@pytest.mark.parametrize("spacing", SPACINGS)
def test_distances_equal_a_banal_loop(spacing: tuple[float, float, float]) -> None:
    truth, prediction = blobs(3, (7, 6, 5))
    expected = banal_distances(truth, prediction, spacing)
    for found, wanted in zip(surface.surface_distances(truth, prediction, spacing), expected, strict=True):
        assert sorted(found) == pytest.approx(sorted(wanted), abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("spacing", SPACINGS)
def test_distances_equal_a_distance_transform_of_the_whole_volume(
    seed: int, spacing: tuple[float, float, float]
) -> None:
    truth, prediction = blobs(seed)
    edges = [surface.boundary(mask) for mask in (truth, prediction)]
    there = ndimage.distance_transform_edt(~edges[1], sampling=spacing)[edges[0]]
    back = ndimage.distance_transform_edt(~edges[0], sampling=spacing)[edges[1]]
    found = surface.surface_distances(truth, prediction, spacing)
    np.testing.assert_allclose(found[0], there, atol=1e-9)
    np.testing.assert_allclose(found[1], back, atol=1e-9)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("tolerance", [0.0, 1.0, 2.0])
def test_metrics_equal_monai(seed: int, spacing: tuple[float, float, float], tolerance: float) -> None:
    import torch
    from monai.metrics import (
        compute_average_surface_distance,
        compute_hausdorff_distance,
        compute_surface_dice,
    )

    truth, prediction = blobs(seed)
    t, p = (torch.from_numpy(m)[None, None].float() for m in (truth, prediction))
    options = {"include_background": True, "spacing": list(spacing)}
    distances = surface.surface_distances(truth, prediction, spacing)
    hd95 = float(compute_hausdorff_distance(p, t, percentile=95, **options))
    assd = float(compute_average_surface_distance(p, t, symmetric=True, **options))
    nsd = float(compute_surface_dice(p, t, class_thresholds=[tolerance], **options))
    assert surface.hausdorff_distance(distances) == pytest.approx(hd95, abs=1e-4)
    assert surface.average_distance(distances) == pytest.approx(assd, abs=1e-4)
    assert surface.surface_dice(distances, tolerance) == pytest.approx(nsd, abs=1e-4)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("axis", range(3))
def test_parallel_plates_are_their_distance_apart(spacing: tuple[float, float, float], axis: int) -> None:
    stop = [20, 20, 20]
    stop[axis] = 1
    plate = box((0, 0, 0), tuple(stop))
    distances = surface.surface_distances(plate, np.roll(plate, 4, axis), spacing)
    apart = 4 * spacing[axis]
    assert surface.hausdorff_distance(distances) == pytest.approx(apart)
    assert surface.average_distance(distances) == pytest.approx(apart)
    assert surface.surface_dice(distances, apart) == 1.0
    assert surface.surface_dice(distances, apart - 0.01) == 0.0


@pytest.mark.parametrize("spacing", SPACINGS)
def test_nested_boxes_are_a_corner_diagonal_apart(spacing: tuple[float, float, float]) -> None:
    inner, outer = box((10, 10, 10), (20, 20, 20)), box((7, 7, 7), (23, 23, 23))
    to_outer, to_inner = surface.surface_distances(inner, outer, spacing)
    assert to_outer.min() == pytest.approx(3 * min(spacing))
    assert to_inner.max() == pytest.approx(3 * float(np.linalg.norm(spacing)))
    assert surface.hausdorff_distance((to_outer, to_inner), 100) == pytest.approx(
        3 * float(np.linalg.norm(spacing))
    )


def test_concentric_balls_are_the_difference_of_their_radii_apart() -> None:
    spacing, shape, centre = (0.5, 0.5, 1.0), (90, 90, 46), (22.0, 22.0, 22.0)
    small, large = (ball(r, centre, spacing, shape) for r in (13.0, 19.0))
    distances = surface.surface_distances(small, large, spacing)
    assert surface.hausdorff_distance(distances) == pytest.approx(6.0, abs=0.6)
    assert surface.average_distance(distances) == pytest.approx(6.0, abs=0.25)
    assert surface.surface_dice(distances, 5.0) < 0.01
    assert surface.surface_dice(distances, 7.0) == 1.0


def test_the_figures_of_the_definition_hold() -> None:
    spacing, shape, centre = (1.0, 1.0, 2.5), (60, 60, 30), (30.0, 30.0, 37.5)
    truth, prediction = ball(15, centre, spacing, shape), ball(15, (33, 33, 42.5), spacing, shape)
    distances = surface.surface_distances(truth, prediction, spacing)
    assert surface.hausdorff_distance(distances) == pytest.approx(5.831, abs=1e-3)
    assert surface.average_distance(distances) == pytest.approx(3.276, abs=1e-3)
    assert surface.surface_dice(distances, 2.0) == pytest.approx(0.270, abs=1e-3)


def test_hausdorff_is_the_larger_directed_percentile_not_that_of_the_union() -> None:
    near, far = np.zeros(99), np.full(9, 7.0)
    assert surface.hausdorff_distance((near, far)) == 7.0
    assert surface.hausdorff_distance((far, near)) == 7.0
    assert surface.hausdorff_distance((np.arange(101.0), near)) == 95.0
    assert surface.average_distance((near, far)) == pytest.approx(63 / 108)


def test_identical_masks_have_no_distance() -> None:
    truth, _ = blobs(1)
    distances = surface.surface_distances(truth, truth, (1.0, 2.0, 3.0))
    assert surface.hausdorff_distance(distances, 100) == 0.0
    assert surface.surface_dice(distances, 0.0) == 1.0


def test_the_rounding_of_a_header_does_not_leave_the_tolerance() -> None:
    spacing = (1.0, 1.0, float(np.float32(0.4)))  # 0.4000000059604645
    one, other = box((5, 5, 5), (9, 9, 6)), box((5, 5, 10), (9, 9, 11))
    distances = surface.surface_distances(one, other, spacing)
    assert distances[0].min() > 2.0
    assert surface.surface_dice(distances, 2.0) == 1.0


def test_the_border_of_the_volume_is_a_surface() -> None:
    assert surface.boundary(np.ones((4, 5, 6), bool)).sum() == 4 * 5 * 6 - 2 * 3 * 4
    assert not surface.boundary(np.zeros((3, 3, 3), bool)).any()


def test_an_empty_mask_is_a_programming_error() -> None:
    with pytest.raises(AssertionError):
        surface.surface_distances(np.zeros((3, 3, 3), bool), np.ones((3, 3, 3), bool), (1, 1, 1))
