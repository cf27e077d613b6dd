"""Geometry against nibabel, SciPy's interpolation behind it, torch and analytic ramps."""

from __future__ import annotations

import json
from itertools import permutations, product

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel.processing import resample_from_to
from scipy.spatial.transform import Rotation

from unetrkit.data.geometry import (
    Grid,
    crop,
    orientation,
    paste,
    ras_axes,
    reorient,
    resample,
    resample_label,
    same_grid,
    spacing_of,
    target_size,
    to_ras,
)
from unetrkit.data.volume import Volume

ORDERS = list(product(permutations(range(3)), product((False, True), repeat=3)))  # 48


def oblique(degrees=(8, -12, 17), spacing=(0.7, 1.1, 2.5), origin=(-90, 35, -400)) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix() * spacing
    affine[:3, 3] = origin
    return affine


def stored_as(volume: Volume, axes, flips) -> Volume:
    """The same voxels at the same places, in another order (an oracle: nibabel's own bookkeeping)."""
    image = nib.Nifti1Image(np.moveaxis(volume.array, 0, -1), volume.affine)
    turned = image.as_reoriented(
        np.array([[axis, -1 if flip else 1] for axis, flip in zip(axes, flips, strict=True)])
    )
    return Volume(np.moveaxis(np.asanyarray(turned.dataobj), -1, 0), turned.affine)


@pytest.fixture(scope="module")
def case() -> Volume:
    return Volume(np.random.default_rng(0).normal(size=(2, 7, 9, 5)).astype(np.float32), oblique())


@pytest.mark.parametrize("degrees", [(0, 0, 0), (8, -12, 17), (-25, 5, 3), (180, 0, 90), (2, 91, -178)])
def test_orientation_agrees_with_nibabel(case: Volume, degrees: tuple[float, ...]) -> None:
    for axes, flips in ORDERS:
        affine = stored_as(Volume(case.array, oblique(degrees)), axes, flips).affine
        assert orientation(affine) == "".join(nib.aff2axcodes(affine))
        assert spacing_of(affine) == pytest.approx(nib.affines.voxel_sizes(affine))


@pytest.mark.parametrize(("axes", "flips"), ORDERS)
def test_to_ras_agrees_with_nibabel(case: Volume, axes, flips) -> None:
    volume = stored_as(case, axes, flips)
    upright, *_ = to_ras(volume)
    image = nib.as_closest_canonical(nib.Nifti1Image(np.moveaxis(volume.array, 0, -1), volume.affine))
    np.testing.assert_array_equal(np.moveaxis(upright.array, 0, -1), np.asanyarray(image.dataobj))
    np.testing.assert_allclose(upright.affine, image.affine, atol=1e-10)
    np.testing.assert_array_equal(upright.array, case.array)
    np.testing.assert_allclose(upright.affine, case.affine, atol=1e-10)


def test_to_ras_at_45_degrees_does_not_depend_on_the_stored_order(case: Volume) -> None:
    volume = Volume(case.array, oblique((0, 0, 45)))
    expected = to_ras(volume)[0].array
    for axes, flips in ORDERS:
        np.testing.assert_array_equal(to_ras(stored_as(volume, axes, flips))[0].array, expected)


@pytest.mark.parametrize(("axes", "flips"), ORDERS)
def test_reorient_stores_a_label_as_its_image_is(case: Volume, axes, flips) -> None:
    image = stored_as(case, (2, 0, 1), (True, False, True))
    turned = reorient(stored_as(case, axes, flips), image.affine)
    np.testing.assert_array_equal(turned.array, image.array)
    np.testing.assert_allclose(turned.affine, image.affine, atol=1e-9)


def test_ras_axes_of_a_sheared_grid_are_always_a_permutation() -> None:
    generator = np.random.default_rng(1)
    for _ in range(500):
        affine = np.eye(4)
        affine[:3, :3] = generator.normal(size=(3, 3))
        axes, flips = ras_axes(affine)
        turned = affine[:3, list(axes)] * np.where(flips, -1, 1)
        assert sorted(axes) == [0, 1, 2]
        assert (np.diag(turned) > 0).all()


@pytest.mark.parametrize(
    ("shape", "spacing", "new", "size"),
    [
        ((10, 10, 10), (1, 1, 1), (1, 1, 1), (10, 10, 10)),
        ((10, 11, 1), (1, 1, 5), (2, 2, 2), (5, 6, 3)),
        ((3, 3, 3), (0.1, 0.1, 0.1), (5, 5, 5), (1, 1, 1)),
        ((512, 512, 200), (0.7, 0.7, 1.5), (1.5, 1.5, 2), (239, 239, 150)),
    ],
)
def test_target_size_is_the_nearest_number_of_voxels(shape, spacing, new, size) -> None:
    assert target_size(shape, spacing, new) == size


@pytest.mark.parametrize("size", [(13, 40, 9), (50, 7, 31), (24, 21, 18)])
def test_resampling_keeps_a_linear_function_of_millimetres(size) -> None:
    shape, affine = (24, 21, 18), oblique(origin=(0, 0, 0))

    def ramp(shape, affine) -> np.ndarray:
        indices = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
        return nib.affines.apply_affine(affine, indices) @ [0.3, -1.0, 0.7]

    # the affine of the resampled grid: its outer faces are those of the old one
    ratio = np.asarray(shape) / size
    resampled = affine @ nib.affines.from_matvec(np.diag(ratio), (ratio - 1) / 2)
    result = resample(ramp(shape, affine)[None].astype(np.float32), size)[0]
    inner = tuple(slice(int(np.ceil(n / m)), -int(np.ceil(n / m))) for n, m in zip(size, shape, strict=True))
    np.testing.assert_allclose(result[inner], ramp(size, resampled)[inner], atol=1e-4)
    # and so does nibabel on noise
    noise = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    oracle = resample_from_to(nib.Nifti1Image(noise, affine), (size, resampled), order=1).get_fdata()
    np.testing.assert_allclose(resample(noise[None], size)[0][inner], oracle[inner], atol=1e-4)


@given(shape=st.tuples(*[st.integers(1, 40)] * 3), size=st.tuples(*[st.integers(1, 40)] * 3))
@settings(max_examples=60, deadline=None)
def test_resample_label_agrees_with_torch(shape, size) -> None:
    label = np.random.default_rng(0).integers(0, 200, shape).astype(np.uint16)
    result = resample_label(label, size)
    oracle = torch.nn.functional.interpolate(
        torch.from_numpy(label.astype(np.float64))[None, None], size=size, mode="nearest-exact"
    )[0, 0].numpy()
    assert result.dtype == np.uint16
    # torch computes places in float32: where the middle of a new voxel meets an old face, either side is so
    places = [((np.arange(n) + 0.5) * m / n) % 1 for n, m in zip(size, shape, strict=True)]
    clear = np.ix_(*[(place > 1e-4) & (place < 1 - 1e-4) for place in places])
    np.testing.assert_array_equal(result[clear], oracle[clear])


@given(
    order=st.sampled_from(ORDERS),
    shape=st.tuples(*[st.integers(1, 9)] * 3),
    data=st.data(),
)
@settings(max_examples=80, deadline=None)
def test_grid_survives_json_and_undoes_itself(order, shape, data) -> None:
    axes, flips = order
    upright = [shape[axis] for axis in axes]
    box = tuple(
        (start := data.draw(st.integers(0, n - 1)), data.draw(st.integers(start + 1, n))) for n in upright
    )
    grid = Grid(shape, Grid.nested(oblique()), axes, flips, box, tuple(stop - start for start, stop in box))
    assert Grid.from_dict(json.loads(json.dumps(grid.to_dict()))) == grid
    native = np.random.default_rng(0).integers(0, 255, shape).astype(np.uint8)
    restored = paste(crop(native, grid), grid)
    inside = paste(np.ones(grid.box_shape, bool), grid)
    np.testing.assert_array_equal(restored, np.where(inside, native, 0))


def test_same_grid_names_the_difference() -> None:
    affine, shape = oblique(), (64, 64, 30)
    shifted, stretched, turned, flipped = affine.copy(), affine.copy(), affine.copy(), affine.copy()
    shifted[:3, 3] += (0, 12, 0)
    stretched[:3, 2] *= 1.1
    turned[:3, :3] = oblique((8, -12, 19))[:3, :3]
    flipped[:3, 0] *= -1
    assert same_grid(affine, shape, affine, shape) is None
    assert same_grid(affine, shape, affine, (64, 64, 29)) == "its shape is 64x64x29 instead of 64x64x30"
    assert same_grid(affine, shape, shifted, shape) == "its origin is 12 mm away"
    assert (
        same_grid(affine, shape, stretched, shape)
        == "its spacing is 0.7x1.1x2.75 mm instead of 0.7x1.1x2.5 mm"
    )
    assert same_grid(affine, shape, flipped, shape) == "its axes are LAS instead of RAS"
    assert "turned by 1.98 degrees" in str(same_grid(affine, shape, turned, shape))


def test_same_grid_accepts_the_rounding_of_headers() -> None:
    affine, shape = oblique(), (512, 512, 400)
    header = nib.Nifti1Header()
    header.set_qform(affine, 1)
    assert same_grid(affine, shape, header.get_qform(), shape) is None
    assert same_grid(affine, shape, affine.astype(np.float32), shape) is None
    moved = affine.copy()
    moved[0, 3] += 0.1 * 0.7
    assert same_grid(affine, shape, moved, shape) is not None


def test_labels_of_another_shape_are_a_programming_error() -> None:
    grid = Grid(
        (4, 4, 4), Grid.nested(np.eye(4)), (0, 1, 2), (False,) * 3, ((0, 4), (0, 4), (1, 3)), (2, 2, 2)
    )
    for function, shape in ((paste, (4, 4, 4)), (crop, (4, 4, 2))):
        with pytest.raises(ValueError, match="4"):
            function(np.zeros(shape, np.uint8), grid)
