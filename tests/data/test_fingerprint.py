"""Plans computed from data: spacing, intensities, patch, classes and the pairs that a mirror exchanges."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest

from unetrkit.data.datalist import Case, Dataset, read_dataset
from unetrkit.data.fingerprint import find_mirror_pairs, make_plan, patch_size_for
from unetrkit.data.plan import Plan
from unetrkit.errors import UserError


def named(pairs: tuple[tuple[int, int], ...], names: dict[int, str]) -> set[tuple[str, str]]:
    return {(names[a], names[b]) for a, b in pairs}


BTCV = "background spleen rkid lkid gall eso liver sto aorta IVC veins pancreas rad lad".split()


@pytest.mark.parametrize(
    ("names", "pairs"),
    [
        (BTCV, {("rkid", "lkid"), ("rad", "lad")}),
        (["background", "right kidney", "left kidney", "Right adrenal", "left adrenal"], {(1, 2), (3, 4)}),
        (["background", "RightParotid", "LeftParotid", "Mandible"], {(1, 2)}),
        (["background", "Eye_L", "Lens L", "Eye_R", "Lung-R", "Lung-L", "Lens R"], {(1, 3), (2, 6), (4, 5)}),
        (["background", "ctx_lh_G", "ctx_rh_G", "Left-Eye", "Right-Eye"], {(1, 2), (3, 4)}),
        (["Unknown", "Left-Lateral-Ventricle", "Right-Lateral-Ventricle", "3rd-Ventricle"], {(1, 2)}),
        (["background", "Lt Eye", "Rt Eye", "LKidney", "RKidney"], {(1, 2), (3, 4)}),
        (["background", "L", "R"], {(1, 2)}),
        # no other half
        (["background", "kidney_left", "lung_right", "lung_middle_lobe_right", "liver"], set()),
        (["background", "vertebrae_L5", "vertebrae_L4", "vertebrae_S1", "rib", "liver"], set()),
        # parts of the heart are not alike
        (["background", "RV", "MYO", "LV"], set()),
        (["background", "left ventricle", "right ventricle", "left atrium", "right atrium"], set()),
        # two names that say the same
        (["background", "left kidney", "right kidney", "Kidney Left", "kidney-left"], {(1, 2)}),
    ],
)  # fmt: skip
def test_mirror_pairs_are_found_by_name(names: list[str], pairs: set) -> None:
    found = find_mirror_pairs(dict(enumerate(names)))
    expected = {tuple(sorted(names.index(n) if isinstance(n, str) else n for n in pair)) for pair in pairs}
    assert set(found) == expected


@pytest.mark.parametrize(
    ("extent", "spacing", "expected"),
    [
        ((35, 50, 36), (1, 1, 1), (48, 64, 48)),
        ((10, 32, 33), (1, 1, 1), (32, 32, 48)),
        ((500, 500, 500), (1, 1, 1), (96, 96, 96)),
        ((400, 300, 60), (0.8, 0.8, 5.0), (160, 160, 32)),
        ((48 * 0.7, 48 * 0.7, 48 * 0.7), (0.7, 0.7, 0.7), (48, 48, 48)),  # 48.00000000000001 voxels are 48
    ],
)
def test_patch_size_is_the_foreground_where_it_fits(extent: tuple, spacing: tuple, expected: tuple) -> None:
    assert patch_size_for(extent, spacing) == expected


def test_every_patch_size_is_within_its_bounds() -> None:
    rng = np.random.default_rng(0)
    for _ in range(500):
        size = patch_size_for(rng.uniform(1, 2000, 3).tolist(), rng.uniform(0.1, 10, 3).tolist())
        assert all(32 <= n <= 160 and n % 16 == 0 for n in size) and np.prod(size) <= 96**3


def write(root: Path, name: str, image: np.ndarray, label: np.ndarray, spacing: tuple = (1, 1, 1)) -> Case:
    affine = np.diag([*spacing, 1.0])
    for array, path in ((image, root / f"{name}.nii"), (label, root / f"{name}_label.nii")):
        nibabel.save(nibabel.Nifti1Image(array, affine), path)
    return Case(name, (root / f"{name}.nii",), root / f"{name}_label.nii", name, "training", None)


def plan_of(
    tmp_path: Path, channel: str, values: list[np.ndarray], labels: dict[int, str] | None = None
) -> Plan:
    """The plan of scans of 20 x 20 x 20 whose foreground, a block of ids 3 and 5, holds the given values."""
    cases = []
    for i, inside in enumerate(values):
        image = np.full((20, 20, 20), -1024 if inside.dtype == np.int16 else 0, inside.dtype)
        label = np.zeros((20, 20, 20), np.uint8)
        image[5:15, 5:15, 5:15] = inside
        label[5:15, 5:15, 5:15] = 3
        label[5:7, 5:15, 5:15] = 5
        cases.append(write(tmp_path, f"c{i}", image, label, (1.0 + i, 2.0, 3.0)))
    channels = (channel,) if channel else ()
    return make_plan(Dataset("d", tmp_path, tuple(cases), labels or {}, channels), workers=1)


HU = [np.random.default_rng(i).integers(-200, 300, (10, 10, 10)).astype(np.int16) for i in range(3)]
SIGNAL = [np.random.default_rng(i).random((10, 10, 10), np.float32) * 900 for i in range(3)]


@pytest.mark.parametrize(
    ("channel", "values", "kind"),
    [
        ("CT", HU, "window"), ("ct", SIGNAL, "window"), ("CT_contrast", HU, "window"), ("MR", HU, "zscore"),
        ("", HU, "window"), ("channel 0", HU, "window"), ("0", SIGNAL, "zscore"), ("", SIGNAL, "zscore"),
        ("CT or MR", HU, "window"), ("CT or MR", SIGNAL, "zscore"), ("T1", SIGNAL, "zscore"),
        ("", HU[:1] + SIGNAL, "zscore"),
    ],
)  # fmt: skip
def test_intensity_follows_what_is_declared_and_then_the_values(
    tmp_path: Path, channel: str, values: list[np.ndarray], kind: str
) -> None:
    found = plan_of(tmp_path, channel, values).intensity
    assert [i.kind for i in found] == [kind]
    if kind == "zscore":
        assert (found[0].lower, found[0].upper) == (0.5, 99.5)


def test_a_window_holds_the_foreground_of_the_whole_set(tmp_path: Path) -> None:
    window = plan_of(tmp_path, "CT", HU).intensity[0]
    expected = np.percentile(np.concatenate(HU), [0.5, 99.5])
    assert (window.lower, window.upper) == (np.floor(expected[0]), np.ceil(expected[1]))


def test_a_window_of_scaled_values_keeps_its_scale(tmp_path: Path) -> None:
    window = plan_of(tmp_path, "CT", [v / 900 for v in SIGNAL]).intensity[0]
    assert window.lower == pytest.approx(0.005, abs=0.003) and window.upper == pytest.approx(0.995, abs=0.003)


def test_spacing_classes_and_statistics(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "CT", HU)
    assert plan.spacing == (2.0, 2.0, 3.0)
    assert [(c.id, c.name) for c in plan.classes] == [(0, "background"), (3, "class 3"), (5, "class 5")]
    assert plan.statistics["cases"] == 3
    assert plan.statistics["share of voxels"] == {"background": 0.875, "class 3": 0.1, "class 5": 0.025}
    declared = plan_of(tmp_path, "CT", HU, {0: "air", 3: "left lung", 5: "right lung", 8: "heart"})
    assert [c.name for c in declared.classes] == ["air", "left lung", "right lung", "heart"]
    assert declared.mirror_pairs == ((3, 5),)


def test_the_plan_does_not_depend_on_how_scans_are_stored(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "CT", HU)
    cases = []
    for path in sorted(tmp_path.glob("c?.nii")):
        pair = []
        for file in (path, path.with_name(f"{path.stem}_label.nii")):
            turned = nibabel.load(file).as_reoriented(np.array([[2, 1], [0, -1], [1, -1]]))
            nibabel.save(turned, tmp_path / f"turned_{file.name}")
            pair.append(tmp_path / f"turned_{file.name}")
        cases.append(Case(path.stem, (pair[0],), pair[1], path.stem, "training", None))
    turned_plan = make_plan(Dataset("d", tmp_path, tuple(cases), {}, ("CT",)), workers=1)
    assert turned_plan == plan


def test_data_that_no_plan_follows_from_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no labelled case"):
        make_plan(Dataset("d", tmp_path, (), {}, ("CT",)))
    case = write(tmp_path, "empty", HU[0], np.zeros(HU[0].shape, np.uint8))
    with pytest.raises(UserError, match="no voxel of `d` is labelled"):
        make_plan(Dataset("d", tmp_path, (case,), {}, ("CT",)))
    case = write(tmp_path, "one", HU[0], np.ones(HU[0].shape, np.uint8))
    with pytest.raises(UserError, match=r"one.*` has 1 channel, declared are 2"):
        make_plan(Dataset("d", tmp_path, (case,), {}, ("CT", "PET")))


def test_real_lists_give_their_pairs(shared_data: Path) -> None:
    abdomen = shared_data / "ct_abdomen_totalseg"
    names = {
        int(k): v for k, v in json.loads((abdomen / "dataset_btcv13.json").read_text())["labels"].items()
    }
    assert named(find_mirror_pairs(names), names) == {
        ("kidney_right", "kidney_left"), ("adrenal_gland_right", "adrenal_gland_left"),
    }  # fmt: skip
    names = {
        int(k): v for k, v in json.loads((abdomen / "dataset_total117.json").read_text())["labels"].items()
    }
    sided = {name for name in names.values() if "left" in name or "right" in name}
    paired = {name for pair in named(find_mirror_pairs(names), names) for name in pair}
    assert sided - paired == {name for name in sided if "heart" in name or "atri" in name} | {
        "lung_middle_lobe_right"
    }
    assert all(
        a.replace("left", "right") == b.replace("left", "right")
        for a, b in named(find_mirror_pairs(names), names)
    )


def test_the_plan_of_hippocampus(shared_data: Path) -> None:
    plan = make_plan(read_dataset(shared_data / "mr_hippocampus" / "dataset_40_10.json"))
    assert plan.patch_size == (48, 64, 48) and plan.spacing == (1.0, 1.0, 1.0)
    assert plan.intensity[0].kind == "zscore" and plan.mirror_pairs == ()


def test_the_plan_of_head_and_neck(shared_data: Path) -> None:
    plan = make_plan(read_dataset(shared_data / "ct_openkbp_hn" / "dataset.json"))
    names = {c.id: c.name for c in plan.classes}
    assert plan.intensity[0].kind == "window" and -1024 <= plan.intensity[0].lower < -500
    assert named(plan.mirror_pairs, names) == {("RightParotid", "LeftParotid")}
    assert 3.7 < plan.spacing[0] < 5.5 and plan.spacing[2] == 2.5


def test_the_plan_of_scans_without_labels_has_no_classes_and_a_window_of_what_is_not_air(
    tmp_path: Path,
) -> None:
    cases = []
    for i, inside in enumerate(HU):
        image = np.full((20, 20, 20), -1024, np.int16)
        image[5:15, 5:15, 5:15] = inside
        case = write(tmp_path, f"c{i}", image, np.zeros_like(image), (1.0 + i, 2.0, 3.0))
        cases.append(replace(case, label=None))
    plan = make_plan(Dataset("d", tmp_path, tuple(cases), {}, ("CT",)), workers=1)
    lower, upper = np.percentile(np.concatenate(HU), [0.5, 99.5])
    assert (plan.intensity[0].lower, plan.intensity[0].upper) == (np.floor(lower), np.ceil(upper))
    assert plan.classes == () and plan.mirror_pairs == () and plan.spacing == (2.0, 2.0, 3.0)
    assert plan.patch_size == plan_of(tmp_path, "CT", HU).patch_size
    assert plan.statistics["cases"] == 3
    with pytest.raises(UserError, match="no labelled case") as caught:
        make_plan(Dataset("d", tmp_path, tuple(cases), {0: "background", 1: "liver"}, ("CT",)))
    assert "--unlabelled" in caught.value.hint


def test_scans_of_nothing_but_air_still_have_a_window(tmp_path: Path) -> None:
    air = np.random.default_rng(0).integers(-1024, -900, (8, 8, 8)).astype(np.int16)
    case = replace(write(tmp_path, "air", air, np.zeros_like(air)), label=None)
    window = make_plan(Dataset("d", tmp_path, (case,), {}, ("CT",)), workers=1).intensity[0]
    assert -1025 < window.lower < window.upper < -899
