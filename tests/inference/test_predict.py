"""Prediction as a user meets it: the same anatomy whatever the file's axes, and no case lost to another."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from itertools import permutations, product

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel.orientations import apply_orientation, inv_ornt_aff

from unetrkit.data.plan import Intensity, Plan
from unetrkit.data.preprocess import preprocess
from unetrkit.data.volume import Volume
from unetrkit.errors import UserError
from unetrkit.inference.cases import Choice, doubts_about
from unetrkit.inference.model import Model
from unetrkit.inference.predict import (
    PredictSettings,
    predict,
    predict_label,
    predict_stored,
)

CPU = PredictSettings(device="cpu")
AFFINE = np.array([[0.9, 0.05, 0, -30], [-0.05, 0.8, 0, 12], [0, 0, 2.1, 4], [0, 0, 0, 1]])
UNIT = np.array([[1.0, 0, 0, -30], [0, 1, 0, 12], [0, 0, 1, 4], [0, 0, 0, 1]])
ORDERS = [
    np.array(list(zip(axes, flips, strict=True)))
    for axes in permutations(range(3))
    for flips in product((1, -1), repeat=3)
]


def truth(image: np.ndarray) -> np.ndarray:
    """What `Thresholds` says of an image in 0..1000, on its own grid."""
    return np.where(image > 800, 300, np.where(image > 400, 7, 0))


def write(path, array, affine=UNIT):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.Nifti1Image(array, affine).to_filename(path)
    return path


def voxels(path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


def test_labels_are_exact_where_nothing_is_resampled(thresholds, blocks):
    label = predict_label([thresholds], Volume(blocks[None].astype(np.float32), np.eye(4)), CPU)
    assert label.dtype == np.uint16
    assert np.array_equal(label, truth(blocks))


@pytest.mark.parametrize("spacing", [(1.5, 1.3, 2.0), (0.6, 1.0, 0.7), (3.0, 0.5, 1.0)])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_boundaries_stay_in_place_through_resampling(thresholds, new_plan, spacing, axis):
    """A linear image is the same function on every grid, so its level sets may not move by half a voxel."""
    model = Model(thresholds.network, new_plan(spacing), thresholds.description)
    shape = (33, 28, 31)
    ramp = 1000 * (np.indices(shape)[axis] + 0.51) / shape[axis]
    label = predict_label([model], Volume(ramp[None].astype(np.float32), np.eye(4)), CPU)
    assert np.array_equal(label, truth(ramp))


@pytest.mark.parametrize(
    "settings", [CPU, PredictSettings(mirrors=("x", "y"), blending="constant", overlap=0.3)]
)
def test_all_48_axis_orders_give_the_same_labels(model, settings):
    rng = np.random.default_rng(1)
    image = rng.integers(-200, 1100, (19, 14, 9)).astype(np.float32)
    reference = predict_label([model], Volume(image[None], AFFINE), settings)
    assert np.bincount(reference.ravel())[[0, 7, 300]].min() > 20
    for order in ORDERS:
        turned = apply_orientation(image, order)
        affine = AFFINE @ inv_ornt_aff(order, image.shape)
        label = predict_label([model], Volume(turned[None], affine), settings)
        assert np.array_equal(label, apply_orientation(reference, order))


def test_a_stored_case_gives_the_labels_of_its_volume(model, blocks):
    volume = Volume(blocks[None].astype(np.float32), AFFINE)
    image, grid = preprocess(volume, model.plan)
    model.network.train()
    stored = predict_stored(model.network, image, grid, model.plan, CPU)
    assert model.network.training
    assert np.array_equal(stored, predict_label([model], volume, CPU))


def test_several_models_are_averaged(model, thresholds, blocks):
    volume = Volume(blocks[None].astype(np.float32), np.eye(4))
    alone = predict_label([thresholds], volume, CPU)
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter.mul_(1e-3)  # close to undecided
    both = predict_label([thresholds, model], volume, CPU)
    assert (both == alone).mean() > 0.9
    twice = predict_label([thresholds, thresholds], volume, CPU)
    assert np.array_equal(twice, alone)


def test_a_mirror_image_exchanges_pairs(plan):
    assert plan.mirrored == (0, 1, 2)
    paired = Plan(**{**plan.model_dump(), "mirror_pairs": ((300, 7),)})
    assert paired.mirrored == (0, 2, 1)


def test_settings_read_words_for_mirrors():
    assert PredictSettings(mirrors=True).mirrors == ("x", "y", "z")
    assert PredictSettings(mirrors=False).mirrors == ()
    assert PredictSettings.model_validate_json('{"mirrors": ["z"], "window": [32, 32, 16]}').mirrors == ("z",)
    with pytest.raises(ValueError, match="less than 1"):
        PredictSettings(overlap=1)


def test_one_file_gives_one_label_on_its_own_grid(tmp_path, save, blocks):
    order = nib.orientations.axcodes2ornt(("L", "S", "P"))
    image = apply_orientation(blocks, order)
    affine = np.eye(4) @ inv_ornt_aff(order, blocks.shape)
    scan = write(tmp_path / "scans" / "ct 1.nii.gz", image, affine)
    (path,) = predict(scan, tmp_path / "out", [save(tmp_path / "model")], CPU)
    assert path == tmp_path / "out" / "ct 1.nii.gz"
    result = nib.load(path)
    assert np.array_equal(voxels(path), truth(image))
    assert np.array_equal(result.affine, affine)
    assert result.get_data_dtype() == np.uint16
    assert b"organ 300" in result.header.extensions[0].get_content()


def test_a_record_says_how_each_label_was_made(tmp_path, save, blocks):
    scan = write(tmp_path / "scans" / "a.nii.gz", blocks)
    model = save(tmp_path / "model")
    seen = []
    predict(scan, tmp_path / "out", [model], CPU, progress=lambda *what: seen.append(what))
    record = json.loads((tmp_path / "out" / "predictions.json").read_text())
    entry = record["cases"]["a"]
    assert entry["label"] == "a.nii.gz"
    assert entry["images"] == [str(scan)]
    assert entry["models"][0]["sha256"] == json.loads((model / "model.json").read_text())["sha256"]
    assert entry["settings"] == CPU.model_dump(mode="json")
    assert 0 <= entry["seconds"] < 60
    assert entry["peak_memory_mb"] > 50
    assert seen[-1] == (1, 1, f"case 1/1 a, window {len(seen)}/{len(seen)}")
    assert [done for done, *_ in seen] == [(k + 1) / len(seen) for k in range(len(seen))]
    # another scan into the same folder keeps the first one's record
    write(tmp_path / "scans" / "b.nii.gz", blocks)
    predict(tmp_path / "scans" / "b.nii.gz", tmp_path / "out", [model], CPU)
    record = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert sorted(record["cases"]) == ["a", "b"]


def test_a_bad_case_does_not_lose_the_others(tmp_path, save, blocks):
    for name in "abd":
        write(tmp_path / "scans" / f"{name}.nii.gz", blocks)
    (tmp_path / "scans" / "c.nii.gz").write_bytes((tmp_path / "scans" / "a.nii.gz").read_bytes()[:-100])
    write(tmp_path / "scans" / "e.nii.gz", np.stack([blocks, blocks], -1))
    seen = []
    with pytest.raises(
        UserError, match=r"2 of 5 cases.*`c`: .*; `e`: `.*e.nii.gz` has 2 channels.* has 1: CT"
    ):
        predict(
            tmp_path / "scans",
            tmp_path / "out",
            [save(tmp_path / "model")],
            CPU,
            progress=lambda *what: seen.append(what),
        )
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == ["a.nii.gz", "b.nii.gz", "d.nii.gz", "predictions.json"]
    assert all(np.array_equal(voxels(tmp_path / "out" / f"{name}.nii.gz"), truth(blocks)) for name in "abd")
    assert seen[-1][:2] == (4, 5)
    assert seen[-1][2].startswith("case 4/5 d, window ")


def datalist(tmp_path, blocks, splits):
    entries: dict[str, list] = {}
    for k, split in enumerate(splits):
        write(tmp_path / f"c{k}.nii.gz", blocks)
        write(tmp_path / f"c{k}_label.nii.gz", truth(blocks).astype(np.uint16))
        entries.setdefault(split, []).append({"image": f"c{k}.nii.gz", "label": f"c{k}_label.nii.gz"})
    path = tmp_path / "list.json"
    path.write_text(json.dumps({"labels": {"0": "background", "7": "a", "300": "b"}, **entries}))
    return path


def test_a_split_selects_cases(tmp_path, save, blocks):
    path = datalist(tmp_path, blocks, ["training", "training", "validation", "test"])
    model = save(tmp_path / "model")
    for split, names in [("training", "c0 c1"), ("validation", "c2"), ("test", "c3"), ("all", "c0 c1 c2 c3")]:
        written = predict(path, tmp_path / split, [model], CPU, Choice(split=split))
        assert " ".join(p.name.removesuffix(".nii.gz") for p in written) == names


def test_validation_cases_are_those_of_the_models_fold(tmp_path, save, blocks):
    path = datalist(tmp_path, blocks, ["training"] * 5)
    names = set()
    for fold in range(5):
        model = save(tmp_path / f"model{fold}", fold=fold)
        names |= {
            p.name for p in predict(path, tmp_path / f"out{fold}", [model], CPU, Choice(split="validation"))
        }
    assert len(names) == 5
    with pytest.raises(UserError, match="different folds"):
        models = [tmp_path / "model0", tmp_path / "model1"]
        predict(path, tmp_path / "both", models, CPU, Choice(split="validation"))


def test_an_empty_split_is_named(tmp_path, save, blocks):
    path = datalist(tmp_path, blocks, ["training"])
    with pytest.raises(UserError, match="has no test cases among its 1"):
        predict(path, tmp_path / "out", [save(tmp_path / "model")], CPU, Choice(split="test"))


def test_scans_and_labels_are_never_overwritten(tmp_path, save, blocks):
    path = datalist(tmp_path, blocks, ["training"])
    before = {file: file.read_bytes() for file in tmp_path.glob("*.nii.gz")}
    for out in (tmp_path, tmp_path / "link"):
        if out != tmp_path:
            out.symlink_to(tmp_path)
        with pytest.raises(UserError, match="holds the scans"):
            predict(path, out, [save(tmp_path / "model")], CPU, overwrite=True)
    assert before == {file: file.read_bytes() for file in tmp_path.glob("*.nii.gz")}


def test_earlier_labels_are_replaced_only_when_asked(tmp_path, save, blocks):
    scan, model = write(tmp_path / "scans" / "a.nii.gz", blocks), save(tmp_path / "model")
    predict(scan, tmp_path / "out", [model], CPU)
    (tmp_path / "out" / "a.nii.gz").write_bytes(b"corrected by hand")
    with pytest.raises(UserError, match="exists already"):
        predict(scan, tmp_path / "out", [model], CPU)
    assert (tmp_path / "out" / "a.nii.gz").read_bytes() == b"corrected by hand"
    predict(scan, tmp_path / "out", [model], CPU, overwrite=True)
    assert np.array_equal(voxels(tmp_path / "out" / "a.nii.gz"), truth(blocks))


def test_ground_truth_is_never_replaced(tmp_path, save, blocks):
    write(tmp_path / "imagesTr" / "a.nii.gz", blocks)
    label = write(tmp_path / "labelsTr" / "a.nii.gz", blocks)
    before = label.read_bytes()
    with pytest.raises(UserError, match=r"a.nii.gz` would be replaced, but no prediction"):
        predict(tmp_path / "imagesTr", label.parent, [save(tmp_path / "model")], CPU, overwrite=True)
    assert [path.read_bytes() for path in label.parent.iterdir()] == [before]


def test_a_failed_case_leaves_no_label_of_an_earlier_model(tmp_path, save, blocks):
    scan, model, out = (
        write(tmp_path / "scans" / "a.nii.gz", blocks),
        save(tmp_path / "model"),
        tmp_path / "out",
    )
    predict(scan, out, [model], CPU)
    scan.write_bytes(scan.read_bytes()[:-100])
    with pytest.raises(UserError):
        predict(scan, out, [model], CPU, overwrite=True)
    assert [path.name for path in out.iterdir()] == ["predictions.json"]
    assert json.loads((out / "predictions.json").read_text())["cases"] == {}


def test_wrong_numbers_of_channels_are_named(tmp_path, save, blocks, new_plan):
    scan = write(tmp_path / "scans" / "a.nii.gz", blocks)
    model = save(tmp_path / "model", new_plan(channels=2))
    with pytest.raises(UserError, match=rf"`{scan}` has 1 channels, .* has 2: CT, PET"):
        predict(scan, tmp_path / "out", [model], CPU)
    assert not list((tmp_path / "out").glob("*.nii.gz"))


def test_one_file_per_channel_as_nnunet_names_them_is_one_case(tmp_path, save, blocks, new_plan):
    for name in ("a_0000", "a_0001", "b_0000", "b_0001"):
        write(tmp_path / "imagesTs" / f"{name}.nii.gz", blocks)
    model = save(tmp_path / "model", new_plan(channels=2))
    written = predict(tmp_path / "imagesTs", tmp_path / "out", [model], CPU)
    assert [path.name for path in written] == ["a.nii.gz", "b.nii.gz"]
    assert np.array_equal(voxels(written[0]), truth(blocks))


def test_models_of_different_plans_are_not_averaged(tmp_path, save, blocks, new_plan):
    scan = write(tmp_path / "scans" / "a.nii.gz", blocks)
    models = [save(tmp_path / "a"), save(tmp_path / "b", new_plan((2.0, 1.0, 1.0)))]
    with pytest.raises(
        UserError, match=r"their spacing differ, \[2.0, 1.0, 1.0\] instead of \[1.0, 1.0, 1.0\]"
    ):
        predict(scan, tmp_path / "out", models, CPU)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("device", "message"), [("gpu", "`device` is `gpu`"), ("cuda:77", r"torch finds \d+ GPUs")]
)
def test_devices_that_are_not_there_are_named(tmp_path, save, blocks, device, message):
    scan = write(tmp_path / "scans" / "a.nii.gz", blocks)
    with pytest.raises(UserError, match=message):
        predict(scan, tmp_path / "out", [save(tmp_path / "model")], PredictSettings(device=device))


class Greedy(torch.nn.Module):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, windows):
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you …"),
    ],
)
def test_too_little_memory_names_what_to_change(model, blocks, error):
    greedy = Model(Greedy(error), model.plan, model.description)
    with pytest.raises(UserError, match="not enough memory for windows of") as caught:
        predict_label([greedy], Volume(blocks[None].astype(np.float32), UNIT), CPU)
    assert "amp=bf16" in caught.value.hint


def test_a_foreign_record_is_not_replaced(tmp_path, save, blocks):
    scan = write(tmp_path / "scans" / "a.nii.gz", blocks)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "predictions.json").write_text("{}")
    with pytest.raises(UserError, match="not the record of a prediction"):
        predict(scan, tmp_path / "out", [save(tmp_path / "model")], CPU)


MEMORY = """
import resource
import numpy as np, torch
from torch import nn
from unetrkit.data.plan import Intensity, LabelClass, Plan
from unetrkit.data.volume import Volume
from unetrkit.inference.model import Model
from unetrkit.inference.predict import PredictSettings, predict_label

classes = 14
plan = Plan(
    dataset="memory", channels=("CT",), spacing=(1.5, 1.5, 1.5), patch_size=(96, 96, 96),
    classes=tuple(LabelClass(id=k, name=str(k)) for k in range(classes)),
    intensity=(Intensity(kind="window", lower=-175, upper=250),),
)
model = Model(nn.Conv3d(1, classes, 1).eval(), plan, {"image_size": [96, 96, 96], "origin": {}})
shape = tuple(SHAPE)
image = np.random.default_rng(0).integers(-170, 240, (1, *shape), dtype=np.int16).astype(np.float32)
volume = Volume(image, np.diag([0.8, 0.8, 0.8, 1]))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
label = predict_label([model], volume, PredictSettings(device="cpu"))
assert label.shape == shape and label.dtype == np.uint8
print(peak() - before, 4 * classes * image.size / 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has another unit")
def test_memory_stays_far_below_all_classes_at_native_resolution():
    script = MEMORY.replace("SHAPE", "(256, 256, 200)")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    used, naive = map(float, done.stdout.split())
    assert naive == 700
    assert used < 0.5 * naive


def test_real_scans_in_other_axis_orders_give_the_same_labels(shared_data, tmp_path, save, new_plan):
    window = Intensity(kind="window", lower=0, upper=100)
    plan = new_plan((3.0, 3.0, 4.0)).model_copy(update={"intensity": (window,)})
    model = save(tmp_path / "model", plan)
    scans = sorted((shared_data / "awkward").glob("orient_*.nii.gz"))
    upright = []
    for scan in scans:
        (path,) = predict(scan, tmp_path / "out", [model], CPU)
        label, image = nib.load(path), nib.load(scan)
        assert label.shape == image.shape
        assert np.array_equal(label.affine, image.affine)
        upright.append(np.asarray(nib.as_closest_canonical(label).dataobj))
    assert len(upright) >= 5
    assert all(np.array_equal(label, upright[0]) for label in upright)
    assert set(np.unique(upright[0])) == {0, 7, 300}


def test_a_dicom_series_is_one_scan(shared_data, tmp_path, save, new_plan):
    series = shared_data / "dicom" / "ct_3slice_with_seg" / "ct"
    (path,) = predict(series, tmp_path / "out", [save(tmp_path / "model", new_plan((3.0, 3.0, 5.0)))], CPU)
    assert path.name == "ct.nii.gz"
    assert nib.load(path).shape[2] == 3


def test_a_folder_of_dicom_series_has_a_case_for_each(shared_data, tmp_path, save, new_plan, blocks):
    series = shared_data / "dicom" / "ct_3slice_with_seg" / "ct"
    shutil.copytree(series, tmp_path / "scans" / "one")
    shutil.copytree(series, tmp_path / "scans" / "two")
    model = save(tmp_path / "model", new_plan((3.0, 3.0, 5.0)))
    written = predict(tmp_path / "scans", tmp_path / "out", [model], CPU)
    assert [path.name for path in written] == ["one.nii.gz", "two.nii.gz"]
    write(tmp_path / "scans" / "a.nii.gz", blocks)
    with pytest.raises(UserError, match=r"holds scans and the DICOM series `.*one`"):
        predict(tmp_path / "scans", tmp_path / "other", [model], CPU)


def test_label_maps_beside_scans_are_left_out_and_named(tmp_path, save, blocks, capsys):
    for name in ("a", "a_msk", "b-seg", "mask_c"):
        write(tmp_path / "scans" / f"{name}.nii.gz", blocks)
    written = predict(tmp_path / "scans", tmp_path / "out", [save(tmp_path / "model")], CPU)
    assert [path.name for path in written] == ["a.nii.gz", "mask_c.nii.gz"]
    assert "`a_msk.nii.gz`, `b-seg.nii.gz`; to segment one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("low", "high", "doubted"),
    [(-1000, 1200, False), (-175, 250, False), (0, 900, True), (-2000, -500, True), (2000, 4000, True)],
)
def test_another_modality_is_doubted(plan, low, high, doubted):
    ct = plan.model_copy(update={"intensity": (Intensity(kind="window", lower=-175, upper=250),)})
    image = np.random.default_rng(0).uniform(low, high, (1, 20, 20, 20)).astype(np.float32)
    assert bool(doubts_about(image, ct)) is doubted
    zscore = plan.model_copy(update={"intensity": (Intensity(kind="zscore", lower=1, upper=99),)})
    assert doubts_about(image, zscore) == []


def test_a_doubt_is_said_and_the_case_segmented(tmp_path, save, blocks, new_plan, capsys):
    ct = new_plan().model_copy(update={"intensity": (Intensity(kind="window", lower=-175, upper=250),)})
    scan = write(tmp_path / "scans" / "a.nii.gz", blocks)
    assert predict(scan, tmp_path / "out", [save(tmp_path / "model", ct)], CPU)
    assert "warning: `a`: its intensities are 0 to 950, the model's window of CT is -175 to 250" in (
        capsys.readouterr().err
    )
