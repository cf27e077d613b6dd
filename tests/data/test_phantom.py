"""The phantom is the demo's and the tests' abdomen: it must be no toy and always the same."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from unetrkit.data.phantom import ORGANS, make_subject, write_phantom

COARSE = 1.6  # of the demo's voxel size: keeps these tests quick


@pytest.fixture(scope="module")
def subjects():
    return [make_subject(7, index, COARSE) for index in range(6)]


def test_every_organ_occurs_and_some_subjects_lack_one(subjects):
    present = [set(np.unique(label)) for _, label in subjects]
    assert set.union(*present) == set(range(len(ORGANS)))
    assert set.intersection(*present) != set(range(len(ORGANS)))


def test_hu_are_those_of_portal_venous_ct(subjects):
    expected = {1: (95, 150), 2: (130, 200), 4: (-20, 45), 6: (85, 140), 8: (120, 190), 11: (55, 120)}
    for volume, label in subjects:
        image = volume.array[0]
        assert image.min() >= -1024 and image.max() <= 3071
        for organ, (low, high) in expected.items():
            core = ndimage.binary_erosion(label == organ)
            if core.sum() > 20:
                assert low < image[core].mean() < high, ORGANS[organ]
        assert -140 < np.median(image[(image > -300) & (image < -40)]) < -70  # fat


def test_subjects_differ_in_anatomy_and_grid(subjects):
    liver_ml = [(label == 6).sum() * abs(np.linalg.det(v.affine)) / 1000 for v, label in subjects]
    assert np.std(liver_ml) / np.mean(liver_ml) > 0.05
    spacings = [np.diag(v.affine)[:3] for v, _ in subjects]
    assert len({tuple(s) for s in spacings}) == len(subjects)
    assert all(s[2] > s[0] for s in spacings)


def test_organs_touch(subjects):
    """Liver and other organs share a border in most subjects: separating them is part of the task."""
    touching = 0
    for _, label in subjects:
        border = ndimage.binary_dilation(label == 6) & ~np.isin(label, (0, 6))
        touching += border.any()
    assert touching >= 4


def test_sides_are_those_of_the_patient(subjects):
    """RAS+: the liver and the right kidney lie at larger x than the spleen and the left kidney."""
    for _, label in subjects:
        x = {organ: ndimage.center_of_mass(label == organ)[0] for organ in np.unique(label)}
        assert x[6] > x.get(1, -1) and x.get(2, 1e9) > x.get(3, -1)


def test_partial_volume_blurs_the_boundary():
    """Between liver (about 112 HU) and lung (-840) there are voxels of every value in between."""
    volume, _ = make_subject(3, 0, COARSE)
    histogram, _ = np.histogram(volume.array, bins=np.arange(-800, -150, 50))
    assert (histogram > 0).all()


def test_same_seed_gives_the_same_files_in_several_orientations(tmp_path):
    first = write_phantom(tmp_path / "a", training=3, validation=1, seed=5, coarseness=3)
    write_phantom(tmp_path / "b", training=3, validation=1, seed=5, coarseness=3)
    datalist = json.loads(first.read_text())
    assert len(datalist["training"]) == 3 and len(datalist["validation"]) == 1
    axes = set()
    for entry in datalist["training"] + datalist["validation"]:
        for key in ("image", "label"):
            assert (tmp_path / "a" / entry[key]).read_bytes() == (tmp_path / "b" / entry[key]).read_bytes()
        image, label = (nib.load(tmp_path / "a" / entry[key]) for key in ("image", "label"))
        np.testing.assert_array_equal(image.affine, label.affine)
        axes.add("".join(nib.aff2axcodes(image.affine)))
    assert len(axes) == 4
