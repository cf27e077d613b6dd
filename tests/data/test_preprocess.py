"""Preprocessing: the stored axis order makes no difference, the numbers of normalising, and the way back."""

from __future__ import annotations

from itertools import permutations, product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from unetrkit.data.geometry import Grid, paste, resample_label
from unetrkit.data.plan import Intensity, LabelClass, Plan
from unetrkit.data.preprocess import foreground_box, normalise, preprocess, preprocess_label
from unetrkit.data.volume import Volume, read_image
from unetrkit.errors import UserError

ORDERS = list(product(permutations(range(3)), product((False, True), repeat=3)))  # 48
WINDOW = Intensity(kind="window", lower=-175, upper=250)
ZSCORE = Intensity(kind="zscore", lower=0.5, upper=99.5)


def restore_label(label: np.ndarray, grid: Grid) -> np.ndarray:
    return paste(resample_label(label, grid.box_shape), grid)


def plan_of(*intensity: Intensity, spacing=(1.0, 1.0, 1.0), ids=(0, 1, 2), crop=True) -> Plan:
    return Plan(
        dataset="test",
        channels=tuple(f"c{k}" for k in range(len(intensity))),
        classes=tuple(LabelClass(id=value, name=f"class {value}") for value in ids),
        spacing=spacing,
        intensity=intensity,
        patch_size=(16, 16, 16),
        crop_foreground=crop,
    )


def stored_as(volume: Volume, axes, flips) -> Volume:
    image = nib.Nifti1Image(np.moveaxis(volume.array, 0, -1), volume.affine)
    turned = image.as_reoriented(
        np.array([[axis, -1 if flip else 1] for axis, flip in zip(axes, flips, strict=True)])
    )
    return Volume(np.moveaxis(np.asanyarray(turned.dataobj), -1, 0), turned.affine)


@given(
    shape=st.tuples(*[st.integers(1, 13)] * 3),
    degrees=st.tuples(*[st.floats(-40, 40)] * 3),
    spacing=st.tuples(*[st.floats(0.4, 4)] * 3),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=12, deadline=None)
def test_all_48_axis_orders_give_the_same_bits_and_come_back(shape, degrees, spacing, seed) -> None:
    generator = np.random.default_rng(seed)
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix() * spacing
    image = generator.normal(100, 200, (2, *shape)).astype(np.float32)
    label = generator.integers(0, 3, (1, *shape)).astype(np.uint8)
    plan = plan_of(WINDOW, ZSCORE, spacing=(1.1, 0.9, 2.0))
    expected, grid = preprocess(Volume(image, affine), plan)
    expected_label = preprocess_label(label, grid, plan)
    expected_native = restore_label(expected_label, grid)
    for axes, flips in ORDERS:
        volume, truth = (stored_as(Volume(array, affine), axes, flips) for array in (image, label))
        array, grid = preprocess(volume, plan)
        indices = preprocess_label(truth.array, grid, plan)
        native = restore_label(indices, grid)
        assert array.dtype == np.float32 and array.flags.c_contiguous
        np.testing.assert_array_equal(array, expected)
        np.testing.assert_array_equal(indices, expected_label)
        turned = stored_as(Volume(expected_native[None], affine), axes, flips)
        np.testing.assert_array_equal(native, turned.array[0])


def test_label_comes_back_bitwise_at_native_spacing() -> None:
    generator = np.random.default_rng(0)
    image = np.full((1, 21, 17, 9), -1000, np.float32)
    image[:, 3:18, 2:15, 1:8] = generator.normal(50, 30, (1, 15, 13, 7))
    label = np.zeros((1, 21, 17, 9), np.uint8)
    label[:, 4:17, 3:14, 2:7] = generator.integers(0, 3, (1, 13, 11, 5))
    affine = np.diag([-0.8, 0.8, 2.5, 1])
    for axes, flips in ORDERS:
        volume, truth = (stored_as(Volume(array, affine), axes, flips) for array in (image, label))
        spacing = nib.affines.voxel_sizes(
            nib.as_closest_canonical(nib.Nifti1Image(truth.array[0], truth.affine)).affine
        )
        plan = plan_of(WINDOW, spacing=tuple(spacing))
        array, grid = preprocess(volume, plan)
        assert array.shape == (1, 15, 13, 7)
        np.testing.assert_array_equal(
            restore_label(preprocess_label(truth.array, grid, plan), grid), truth.array[0]
        )


def test_foreground_of_several_channels_is_their_union() -> None:
    image = np.full((2, 8, 9, 10), -1000, np.float32)
    image[0, 2, 3, 4] = 0
    image[1, 5, 1, 4] = -900
    assert foreground_box(image, (WINDOW, ZSCORE)) == ((2, 6), (1, 4), (4, 5))
    assert foreground_box(image[:1] * 0 - 1000, (WINDOW,)) == ((0, 8), (0, 9), (0, 10))
    array, grid = preprocess(Volume(image, np.eye(4)), plan_of(WINDOW, ZSCORE, crop=False))
    assert array.shape == (2, 8, 9, 10) and grid.box == ((0, 8), (0, 9), (0, 10))


def test_zscore_has_mean_0_and_deviation_1_over_the_foreground() -> None:
    channel = np.zeros((20, 20, 20), np.float32)
    channel[5:] = np.random.default_rng(0).normal(1e4, 300, (15, 20, 20))
    inside = channel > 0
    lowest, highest = np.percentile(channel[inside], [0.5, 99.5])
    clipped = np.clip(channel, lowest, highest)
    oracle = (clipped - clipped[inside].mean(dtype=np.float64)) / clipped[inside].std(dtype=np.float64)
    normalise(channel, ZSCORE)
    np.testing.assert_allclose(channel, oracle, atol=1e-5)
    assert abs(channel[inside].mean(dtype=np.float64)) < 1e-5
    assert channel[inside].std(dtype=np.float64) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("values", [[7.0, 7.0, 7.0], [0.0, 5.0, 5.0], [0.1, 0.7, 0.7]])
def test_zscore_of_a_constant_channel_is_small(values: list[float]) -> None:
    channel = np.repeat(np.array(values, np.float32), 1000).reshape(3, 10, 100)
    normalise(channel, ZSCORE)
    assert np.abs(channel).max() < 1


def test_the_callers_volume_is_not_changed() -> None:
    image = np.random.default_rng(0).normal(0, 100, (1, 6, 6, 6)).astype(np.float32)
    before = image.copy()
    preprocess(Volume(image, np.eye(4)), plan_of(WINDOW, crop=False))
    np.testing.assert_array_equal(image, before)


def test_label_ids_become_class_indices() -> None:
    plan = plan_of(WINDOW, ids=(0, 41, 300, 65535))
    _, grid = preprocess(Volume(np.ones((1, 2, 2, 2), np.float32), np.eye(4)), plan)
    label = np.array([0, 41, 300, 65535, 0, 0, 41, 41]).reshape(1, 2, 2, 2)
    for dtype in (np.uint16, np.int32, np.int64):
        assert preprocess_label(label.astype(dtype), grid, plan).ravel().tolist() == [0, 1, 2, 3, 0, 0, 1, 1]
    label[0, 0, 0, 0] = 70000
    label[0, 0, 0, 1] = 5
    with pytest.raises(UserError, match="not classes of the plan: 5, 70000"):
        preprocess_label(label, grid, plan)


def test_wrong_channels_and_implausible_spacing_are_refused() -> None:
    with pytest.raises(UserError, match="2 channels, the plan `test` has 1: c0"):
        preprocess(Volume(np.ones((2, 3, 3, 3), np.float32), np.eye(4)), plan_of(WINDOW))
    with pytest.raises(UserError, match="would have"):
        preprocess(
            Volume(np.ones((1, 30, 30, 30), np.float32), np.diag([900.0, 900, 900, 1])), plan_of(WINDOW)
        )


def test_six_stored_orders_of_one_brain_give_one_array(shared_data: Path) -> None:
    arrays = [
        preprocess(read_image([path]), plan_of(ZSCORE, spacing=(3.0, 3.0, 3.0)))[0]
        for path in sorted((shared_data / "awkward").glob("orient_*.nii.gz"))
    ]
    assert len(arrays) == 6
    for array in arrays[1:]:
        assert array.shape == arrays[0].shape
        # the six files carry slopes that differ in the last bits
        np.testing.assert_allclose(array, arrays[0], atol=1e-4)


def test_without_resampling_every_case_keeps_its_own_spacing() -> None:
    generator = np.random.default_rng(0)
    for spacing in ((1.5, 0.7, 3.0), (0.9, 2.0, 1.0)):
        image = np.full((1, 9, 12, 7), -1000.0, np.float32)
        image[0, 2:7, 3:11, 1:6] = generator.uniform(-170, 240, (5, 8, 5))
        label = generator.integers(0, 3, (1, 9, 12, 7)).astype(np.uint8)
        plan = plan_of(WINDOW, spacing=(1.1, 1.1, 1.1)).model_copy(update={"resample": False})
        # stored L, P, S
        array, grid = preprocess(Volume(image, np.diag([-spacing[0], -spacing[1], spacing[2], 1])), plan)
        assert grid.size == grid.box_shape == (5, 8, 5)
        upright = image[:, ::-1, ::-1][:, 2:7, 1:9, 1:6]
        np.testing.assert_allclose(array, (upright + 175) / 425, atol=1e-6)
        native = restore_label(preprocess_label(label, grid, plan), grid)
        np.testing.assert_array_equal(native[2:7, 3:11, 1:6], label[0, 2:7, 3:11, 1:6])
