from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import ndimage
from tests.data.small_store import small_plan

from unetrkit.data.augment import (
    Augmentation,
    AugmentSettings,
    apply_intensity,
    apply_label,
    apply_spatial,
    draw_augmentation,
)
from unetrkit.data.augment_intensity import INTENSITY
from unetrkit.data.augment_spatial import (
    Orientation,
    Warp,
    apply_orientation,
    apply_warp,
    draw_orientation,
    warp_matrix,
)
from unetrkit.data.sampling import generator_for

SIZE, SPACING = (20, 18, 16), (1.5, 1.5, 2.0)
FLIPS = list(itertools.product([False, True], repeat=3))
ALWAYS = {f"p_{name}": 1.0 for name in ("flip", "rot90", "rotate", "zoom", "elastic", *INTENSITY)}


def noise_image(*shape, dtype=torch.float32):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def smooth_image(*shape):
    return torch.from_numpy(ndimage.gaussian_filter(noise_image(*shape).numpy(), 2.0) * 4)


def strong_draws(n, size=SIZE):
    settings = AugmentSettings(set="strong", **ALWAYS)
    return [draw_augmentation(generator_for(0, i), settings, size, SPACING) for i in range(n)]


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
@pytest.mark.parametrize("flips", FLIPS)
def test_orientation_is_monai_flips_then_rot90(flips, turns):
    from monai.transforms import Flip, Rotate90

    image = noise_image(2, 4, 5, 6)
    expected = image
    for axis in range(3):
        if flips[axis]:
            expected = Flip(axis)(expected)
    if turns:
        expected = Rotate90(turns, (0, 1))(expected)
    ours = apply_orientation(Orientation(flips, turns), image)
    assert torch.equal(ours, torch.as_tensor(expected))


def test_orientation_is_drawn_with_published_probabilities():
    drawn = [draw_orientation(generator_for(0, i), 0.2, 0.2, (16, 16, 32)) for i in range(8000)]
    for axis in range(3):
        assert np.mean([o.flips[axis] for o in drawn]) == pytest.approx(0.2, abs=0.015)
    for k in (1, 2, 3):
        assert np.mean([o.turns == k for o in drawn]) == pytest.approx(0.2 / 3, abs=0.01)
    flipped = np.array([o.flips for o in drawn], float)
    assert np.abs(np.corrcoef(flipped.T) - np.eye(3)).max() < 0.05


def test_unequal_sides_are_only_turned_by_half():
    drawn = [draw_orientation(generator_for(0, i), 0.0, 1.0, (16, 32, 16)) for i in range(50)]
    assert {o.turns for o in drawn} == {2}


def test_default_set_is_drawn_with_published_probabilities_and_ranges():
    settings = AugmentSettings()
    drawn = [draw_augmentation(generator_for(1, i), settings, SIZE, SPACING) for i in range(8000)]
    assert all(a.warp is None for a in drawn)
    changes = [change for a in drawn for change in a.changes]
    assert {name for name, _ in changes} == {"scale", "shift"}
    for wanted in ("scale", "shift"):
        amounts = [amount for name, amount in changes if name == wanted]
        assert len(amounts) / 8000 == pytest.approx(0.1, abs=0.01)
        assert -0.1 <= min(amounts) < -0.09 and 0.09 < max(amounts) <= 0.1
        assert np.mean(amounts) == pytest.approx(0.0, abs=0.01)


def test_strong_set_draws_everything_within_its_ranges():
    drawn = [
        draw_augmentation(generator_for(2, i), AugmentSettings(set="strong"), SIZE, SPACING)
        for i in range(3000)
    ]
    # one of three with probability 0.2 each
    assert np.mean([a.warp is not None for a in drawn]) == pytest.approx(1 - 0.8**3, abs=0.03)
    assert np.mean([a.warp is not None and any(a.warp.elastic) for a in drawn]) == pytest.approx(
        0.2, abs=0.03
    )
    for a in drawn:
        if a.warp is not None:
            zoom = np.linalg.det(np.array(a.warp.matrix)) ** (-1 / 3)
            assert 0.7 - 1e-9 <= zoom <= 1.4 + 1e-9
            assert max(e * s for e, s in zip(a.warp.elastic, SPACING, strict=True)) <= 4.0 + 1e-9
    settings = AugmentSettings()
    for name in ("noise", "blur", "contrast", "low_resolution", "gamma"):
        amounts = [amount for a in drawn for n, amount in a.changes if n == name]
        assert len(amounts) / 3000 == pytest.approx(getattr(settings, f"p_{name}"), abs=0.03)
        bounds = (0.0, settings.noise) if name == "noise" else getattr(settings, name)
        assert bounds[0] <= min(amounts) and max(amounts) <= bounds[1]
        assert np.mean(amounts) == pytest.approx(np.mean(bounds), rel=0.1)


def test_none_changes_nothing():
    image = noise_image(1, *SIZE)
    a = draw_augmentation(generator_for(0), AugmentSettings(set="none", **ALWAYS), SIZE, SPACING)
    assert a == Augmentation(Orientation())
    assert torch.equal(apply_intensity(a, apply_spatial(a, image)), image)


def test_scale_shift_and_gamma_are_monai():
    from monai.transforms import AdjustContrast, ScaleIntensity, ShiftIntensity

    image = noise_image(1, *SIZE) * 3 - 1
    pairs = [
        (INTENSITY["scale"](image, -0.07, 0), ScaleIntensity(minv=None, maxv=None, factor=-0.07)(image)),
        (INTENSITY["shift"](image, 0.07, 0), ShiftIntensity(0.07)(image)),
        (INTENSITY["gamma"](image, 1.3, 0), AdjustContrast(1.3, retain_stats=True)(image)),
    ]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, torch.as_tensor(theirs), atol=2e-6, rtol=1e-6)


def test_contrast_stretches_about_the_mean_within_the_range():
    image = torch.tensor([0.0, 0.4, 0.6, 1.0]).view(1, 1, 1, 4)
    torch.testing.assert_close(
        INTENSITY["contrast"](image, 0.5, 0).ravel(), torch.tensor([0.25, 0.45, 0.55, 0.75])
    )
    torch.testing.assert_close(
        INTENSITY["contrast"](image, 2.0, 0).ravel(), torch.tensor([0.0, 0.3, 0.7, 1.0])
    )


@pytest.mark.parametrize("sigma", [0.5, 0.83, 1.0])
def test_blur_is_scipy_gaussian_filter(sigma):
    image = noise_image(2, *SIZE)
    expected = [
        ndimage.gaussian_filter(c.numpy(), sigma, mode="nearest", radius=math.ceil(3 * sigma)) for c in image
    ]
    np.testing.assert_allclose(INTENSITY["blur"](image, sigma, 0), np.stack(expected), atol=2e-6)


def test_noise_has_the_asked_deviation_and_follows_its_seed():
    image = noise_image(1, 40, 40, 40) * 5
    noisy = INTENSITY["noise"](image, 0.2, 7)
    assert float((noisy - image).std() / image.std()) == pytest.approx(0.2, rel=0.02)
    assert torch.equal(noisy, INTENSITY["noise"](image, 0.2, 7))
    assert not torch.equal(noisy, INTENSITY["noise"](image, 0.2, 8))


def test_low_resolution_keeps_a_ramp_and_removes_detail():
    image = noise_image(1, 24, 24, 24)
    assert torch.equal(INTENSITY["low_resolution"](image, 1.0, 0), image)
    fine = torch.arange(24).remainder(2).float().expand(1, 24, 24, 24)
    assert INTENSITY["low_resolution"](fine, 0.5, 0).std() < 1e-6
    ramp = torch.arange(24).float().expand(1, 24, 24, 24)
    assert (INTENSITY["low_resolution"](ramp, 0.5, 0) - ramp).abs().max() <= 1.0


def test_constant_image_stays_finite_under_every_change():
    image = torch.full((1, *SIZE), 0.25)
    for name, change in INTENSITY.items():
        assert torch.isfinite(change(image, 0.7, 0)).all(), name


@pytest.mark.parametrize("angles", [(0.3, 0.0, 0.0), (0.0, -0.5, 0.0), (0.2, 0.4, -0.3)])
@pytest.mark.parametrize("zoom", [0.7, 1.3])
def test_warp_is_scipy_affine_transform(angles, zoom):
    image = smooth_image(*SIZE)
    matrix = np.array(warp_matrix(angles, zoom, SPACING))
    centre = (np.array(SIZE) - 1) / 2
    offset = centre - matrix @ centre
    ours = apply_warp(Warp(tuple(map(tuple, matrix.tolist()))), image, "bilinear")
    expected = ndimage.affine_transform(image.numpy(), matrix, offset, order=1, mode="nearest")
    np.testing.assert_allclose(ours, expected, atol=2e-5)


def test_rotation_is_in_millimetres_and_right_handed():
    # a quarter turn about z takes x to y: where y voxels are twice as long, half as many of them
    matrix = np.array(warp_matrix((0.0, 0.0, math.pi / 2), 1.0, (1.0, 2.0, 3.0)))
    source = np.array([4.0, 0.0, 0.0])
    result = np.linalg.solve(matrix, source)
    np.testing.assert_allclose(result, [0.0, 2.0, 0.0], atol=1e-12)


def test_zoom_magnifies():
    x = torch.stack(torch.meshgrid(*(torch.arange(s) - (s - 1) / 2 for s in SIZE), indexing="ij"))
    ball = (x.square().sum(0) < 4**2).to(torch.uint8)
    larger = apply_warp(Warp(warp_matrix((0, 0, 0), 1.5, SPACING)), ball, "nearest")
    assert int(larger.sum()) / int(ball.sum()) == pytest.approx(1.5**3, rel=0.05)


def test_elastic_field_moves_voxels_by_its_amplitude_without_folding():
    size = (96, 96, 64)
    axes = [axis.float() for axis in torch.meshgrid(*map(torch.arange, size), indexing="ij")]
    identity = warp_matrix((0, 0, 0), 1.0, SPACING)
    strongest = (4 / 1.5, 4 / 1.5, 4 / 2.0)
    inside = (slice(None), slice(12, -12), slice(12, -12), slice(12, -12))
    for seed in range(3):
        warped = torch.stack([apply_warp(Warp(identity, strongest, seed), a, "bilinear") for a in axes])
        moved = (warped - torch.stack(axes))[inside]
        for axis in range(3):
            # few control points lie in one patch, so the deviation of one field varies
            assert 0.5 * strongest[axis] < float(moved[axis].square().mean().sqrt()) < 1.5 * strongest[axis]
        jacobian = torch.stack([torch.stack(torch.gradient(w)) for w in warped[inside]])
        determinant = torch.linalg.det(jacobian.permute(2, 3, 4, 0, 1))
        assert float((determinant > 0).float().mean()) == 1.0


def test_image_and_label_stay_aligned_through_every_spatial_change():
    label = torch.from_numpy((ndimage.gaussian_filter(noise_image(*SIZE).numpy(), 2) > 0.5).astype(np.uint8))
    image = label[None].float()
    for a in strong_draws(40):
        moved, moved_label = apply_spatial(a, image), apply_label(a, label)
        assert moved_label.dtype == torch.uint8 and moved_label.shape == label.shape
        # where all eight neighbours agree, the nearest one says the same
        certain = (moved[0] > 0.999) | (moved[0] < 0.001)
        assert certain.float().mean() > 0.3
        assert torch.equal(moved[0][certain].round(), moved_label[certain].float())
        assert ((moved[0] > 0.5) == moved_label.bool()).float().mean() > 0.95


def test_batched_and_single_are_the_same_and_nothing_is_changed_in_place():
    images, labels = noise_image(3, 2, *SIZE), (noise_image(3, *SIZE) * 5).to(torch.uint8)
    table = small_plan().mirrored
    before = images.clone(), labels.clone()
    for a in strong_draws(20):
        spatial, intense = apply_spatial(a, images), apply_intensity(without_noise(a), images)
        moved = apply_label(a, labels, table)
        for i in range(3):
            torch.testing.assert_close(spatial[i], apply_spatial(a, images[i]), atol=1e-6, rtol=0)
            torch.testing.assert_close(
                intense[i], apply_intensity(without_noise(a), images[i]), atol=1e-5, rtol=0
            )
            assert torch.equal(moved[i], apply_label(a, labels[i], table))
        apply_intensity(a, images)
        assert torch.equal(images, before[0]) and torch.equal(labels, before[1])


def without_noise(a):
    return Augmentation(a.orientation, a.warp, tuple(c for c in a.changes if c[0] != "noise"), a.seed)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
@pytest.mark.parametrize("flips", FLIPS)
def test_paired_organs_exchange_classes_in_a_mirror_image(flips, dtype):
    # ids 30 and 50 are classes 2 and 3
    table = small_plan().mirrored
    assert table == (0, 1, 3, 2, 4)
    label = (noise_image(4, 5, 6) * 5).to(dtype)
    for turns in range(4):
        a = Augmentation(Orientation(flips, turns))
        unnamed, named = apply_label(a, label), apply_label(a, label, table)
        expected = torch.tensor(table)[unnamed.long()].to(dtype) if sum(flips) % 2 else unnamed
        assert torch.equal(named, expected) and named.dtype == dtype


def test_two_flips_and_half_a_turn_are_the_same_to_image_and_label():
    image, label = noise_image(1, *SIZE), (noise_image(*SIZE) * 5).to(torch.uint8)
    flipped, turned = (Augmentation(Orientation(*o)) for o in (((True, True, False), 0), ((False,) * 3, 2)))
    assert torch.equal(apply_spatial(flipped, image), apply_spatial(turned, image))
    table = small_plan().mirrored
    assert torch.equal(apply_label(flipped, label, table), apply_label(turned, label, table))


def test_plan_without_pairs_exchanges_nothing():
    assert small_plan(mirror_pairs=()).mirrored == (0, 1, 2, 3, 4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_gives_what_the_cpu_gives():
    image, label = smooth_image(1, *SIZE), (noise_image(*SIZE) * 5).to(torch.uint8)
    for a in map(without_noise, strong_draws(10)):
        torch.testing.assert_close(
            apply_spatial(a, image.cuda()).cpu(), apply_spatial(a, image), atol=1e-4, rtol=0
        )
        torch.testing.assert_close(
            apply_intensity(a, image.cuda()).cpu(), apply_intensity(a, image), atol=1e-4, rtol=0
        )
        assert (apply_label(a, label.cuda()).cpu() != apply_label(a, label)).float().mean() < 1e-3
