"""From files to a store: the right voxels, only what changed, and the same bytes after any interruption."""

from __future__ import annotations

import hashlib
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest

from unetrkit.data.datalist import Case, Dataset
from unetrkit.data.plan import Intensity, LabelClass, Plan, override_plan
from unetrkit.data.prepare import prepare
from unetrkit.data.preprocess import preprocess, preprocess_label
from unetrkit.data.store import Store
from unetrkit.data.volume import read_image, read_label
from unetrkit.errors import UserError

PLAN = Plan(
    dataset="phantom",
    channels=("CT",),
    classes=(
        LabelClass(id=0, name="background"),
        LabelClass(id=4, name="liver"),
        LabelClass(id=9, name="spleen"),
    ),
    spacing=(2.0, 2.0, 2.5),
    intensity=(Intensity(kind="window", lower=-175, upper=250),),
    patch_size=(32, 32, 32),
)

# the spacing of `make_dataset`: nothing to resample, so that a new process need not import torch
NATIVE = override_plan(PLAN, ["spacing=1.5,1.4,3.0"])


def make_dataset(root: Path, cases: int = 6) -> Dataset:
    """CT-like scans of a block with two organs in air, LPS; the last one is for validation."""
    root.mkdir(parents=True, exist_ok=True)
    entries = []
    for i in range(cases):
        rng = np.random.default_rng(i)
        shape = tuple(rng.integers(24, 40, 3).tolist())
        image = np.full(shape, -1000, np.int16)
        image[4:-4, 3:-5, 2:] = rng.integers(-100, 200, image[4:-4, 3:-5, 2:].shape)
        label = np.zeros(shape, np.uint8)
        label[6:10, 6:12, 5:12] = 4
        label[14:18, 6:9, 5:20] = 9
        affine = np.diag([-1.5, -1.4, 3.0, 1.0])
        for array, path in ((image, root / f"ct_{i}.nii.gz"), (label, root / f"ct_{i}_label.nii.gz")):
            nibabel.save(nibabel.Nifti1Image(array, affine), path)
        split = "validation" if i == cases - 1 else "training"
        name = f"ct_{i}"
        entries.append(
            Case(name, (root / f"{name}.nii.gz",), root / f"{name}_label.nii.gz", f"s{i}", split, None)
        )
    return Dataset("phantom", root, tuple(entries), {0: "background", 4: "liver", 9: "spleen"}, ("CT",))


def digests(store: Path) -> dict[str, str]:
    return {
        str(file.relative_to(store)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(store.rglob("*"))
        if file.is_file()
    }


def redone(store: Path, dataset: Dataset, plan: Plan = PLAN) -> list[str]:
    """The cases that a further `prepare` writes anew."""
    before = {path.name: path.stat().st_ino for path in (store / "cases").glob("*")}
    summary = prepare(dataset, plan, store, workers=1)
    after = {path.name: path.stat().st_ino for path in (store / "cases").iterdir()}
    names = sorted(name for name in after if after[name] != before.get(name))
    assert summary.redone == len(names) and summary.cases == len(after)
    return names


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return make_dataset(tmp_path / "data")


def test_a_stored_case_is_the_preprocessed_scan(dataset: Dataset, tmp_path: Path) -> None:
    seen = []
    summary = prepare(
        dataset, PLAN, tmp_path / "store", workers=1, progress=lambda *report: seen.append(report)
    )
    assert seen == [(i + 1, 6, f"ct_{i}") for i in range(6)]
    assert (summary.cases, summary.redone, summary.removed) == (6, 6, 0) and summary.size > 10_000
    store = Store.open(tmp_path / "store")
    assert [case.split for case in store.cases] == ["training"] * 5 + ["validation"]
    for case, source in zip(store.cases, dataset.cases, strict=True):
        array, grid = preprocess(read_image(source.images), PLAN)
        label = preprocess_label(read_label(source.label).array, grid, PLAN)
        assert case.grid == grid and case.images == source.images and case.label_file == source.label
        assert np.array_equal(case.whole_image(), array.astype(np.float16).astype(np.float32))
        assert np.array_equal(case.label((0, 0, 0), case.shape), label)
        assert case.counts == tuple(np.bincount(label.ravel(), minlength=3))


def test_nothing_is_redone_without_a_reason(dataset: Dataset, tmp_path: Path) -> None:
    prepare(dataset, PLAN, tmp_path / "store", workers=1)
    before = digests(tmp_path / "store")
    for file in dataset.root.iterdir():
        file.touch()
    assert redone(tmp_path / "store", dataset) == []
    assert redone(tmp_path / "store", dataset, override_plan(PLAN, ["patch_size=48,48,32"])) == []
    assert Store.open(tmp_path / "store").plan.patch_size == (48, 48, 32)
    assert redone(tmp_path / "store", dataset) == []
    assert digests(tmp_path / "store") == before


def test_a_changed_file_redoes_its_case(dataset: Dataset, tmp_path: Path) -> None:
    prepare(dataset, PLAN, tmp_path / "store", workers=1)
    label = nibabel.load(dataset.cases[2].label)
    array = np.asarray(label.dataobj)
    array[6, 6, 5] = 9
    nibabel.save(nibabel.Nifti1Image(array, label.affine), dataset.cases[2].label)
    assert redone(tmp_path / "store", dataset) == ["ct_2"]
    fresh = tmp_path / "fresh"
    prepare(dataset, PLAN, fresh, workers=1)
    assert digests(fresh) == digests(tmp_path / "store")


@pytest.mark.parametrize("named", [".hdr", ".img"])
def test_a_change_in_either_file_of_a_pair_redoes_its_case(tmp_path: Path, named: str) -> None:
    dataset = make_dataset(tmp_path / "data", 1)
    (case,) = dataset.cases
    image = nibabel.load(case.images[0])
    array = np.asarray(image.dataobj).copy()
    nibabel.save(nibabel.Nifti1Pair(array, image.affine), tmp_path / "data/pair.hdr")
    dataset = replace(dataset, cases=(replace(case, images=(tmp_path / f"data/pair{named}",)),))
    assert redone(tmp_path / "store", dataset) == ["ct_0"] and redone(tmp_path / "store", dataset) == []
    array[9, 9, 9] += 1
    nibabel.save(nibabel.Nifti1Pair(array, image.affine), tmp_path / "data/pair.hdr")
    assert redone(tmp_path / "store", dataset) == ["ct_0"] and redone(tmp_path / "store", dataset) == []


def test_another_plan_redoes_every_case(dataset: Dataset, tmp_path: Path) -> None:
    prepare(dataset, PLAN, tmp_path / "store", workers=1)
    assert len(redone(tmp_path / "store", dataset, override_plan(PLAN, ["spacing=2,2,3"]))) == 6
    assert Store.open(tmp_path / "store").plan.spacing == (2, 2, 3)


@pytest.mark.parametrize("name", ["image.chunks", "label.chunks", "centres.chunks", "case.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_case_is_redone_and_no_other(
    dataset: Dataset, tmp_path: Path, name: str, damage: str
) -> None:
    store = tmp_path / "store"
    prepare(dataset, PLAN, store, workers=1)
    before = digests(store)
    file = store / "cases" / "ct_3" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes(content if damage == "flip" else content[:-1])
    assert redone(store, dataset) == ["ct_3"]
    assert digests(store) == before


@pytest.mark.parametrize("name", ["store.json", "plan.json"])
def test_a_damaged_index_or_plan_is_written_again(dataset: Dataset, tmp_path: Path, name: str) -> None:
    store = tmp_path / "store"
    prepare(dataset, PLAN, store, workers=1)
    before = digests(store)
    (store / name).write_bytes(b"{")
    assert redone(store, dataset) == []
    assert digests(store) == before


def test_cases_that_went_from_the_data_set_are_removed(dataset: Dataset, tmp_path: Path) -> None:
    store = tmp_path / "store"
    prepare(dataset, PLAN, store, workers=1)
    (store / "cases" / "notes").mkdir()
    (store / "cases" / "notes" / "mine.txt").touch()
    fewer = Dataset(dataset.name, dataset.root, dataset.cases[2:], dataset.labels, dataset.channels)
    assert prepare(fewer, PLAN, store, workers=1).removed == 2
    assert sorted(entry.name for entry in (store / "cases").iterdir()) == [
        "ct_2",
        "ct_3",
        "ct_4",
        "ct_5",
        "notes",
    ]


KILL = """
import os, sys
from functools import partial
from pathlib import Path
from unetrkit.data import processes
from unetrkit.data.prepare import prepare
sys.path.insert(0, sys.argv[1])
import test_prepare as own

def fsync(descriptor, real=os.fsync, left=[int(sys.argv[4])]):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), 9)
    real(descriptor)

def progress(done, total, name):
    if done == int(sys.argv[5]):
        os.kill(os.getpid(), 9)

if __name__ == "__main__":
    os.fsync = fsync
    processes.for_each = partial(processes.for_each, patience=0)
    dataset = own.make_dataset(Path(sys.argv[2]))
    prepare(dataset, own.NATIVE, Path(sys.argv[3]), workers=int(sys.argv[6]), progress=progress)
"""


def test_killed_again_and_again_it_ends_with_the_same_bytes(dataset: Dataset, tmp_path: Path) -> None:
    prepare(dataset, NATIVE, tmp_path / "whole", workers=1)
    (tmp_path / "kill.py").write_text(KILL)
    store = tmp_path / "store"
    # the write at which to die (counted in this process), the finished case at which to die, workers
    for write, case, workers in ((3, 0, 1), (6, 0, 1), (0, 3, 2), (13, 0, 1), (0, 6, 1)):
        command = [sys.executable, tmp_path / "kill.py", Path(__file__).parent, dataset.root, store]
        ended = subprocess.run(
            [*command, str(write), str(case), str(workers)], capture_output=True, text=True
        )
        assert ended.returncode == -9, ended.stderr
        with pytest.raises(UserError, match=r"not finished|no store"):
            Store.open(store)
    prepare(dataset, NATIVE, store, workers=1)
    assert digests(store) == digests(tmp_path / "whole")


@pytest.mark.parametrize(
    "content", [["config.yaml"], ["plan.json", "model"], ["cases"], ["scan.nii.gz", "cases"]]
)
def test_a_folder_with_anything_else_is_not_touched(
    dataset: Dataset, tmp_path: Path, content: list[str]
) -> None:
    out = tmp_path / "out"
    for name in content:
        (out / name).mkdir(parents=True)
    before = sorted(out.rglob("*"))
    with pytest.raises(UserError, match="not a store"):
        prepare(dataset, PLAN, out, workers=1)
    assert sorted(out.rglob("*")) == before
    shutil.rmtree(out)
    out.touch()
    with pytest.raises(UserError, match="is a file"):
        prepare(dataset, PLAN, out, workers=1)


def test_a_full_disk_is_said_and_leaves_nothing_half_written(dataset: Dataset, tmp_path: Path) -> None:
    store = tmp_path / "store"
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"case `ct_0`.*cannot write") as caught:
            prepare(dataset, PLAN, store, workers=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert "space" in caught.value.hint
    assert list((store / "cases").iterdir()) == []
    prepare(dataset, PLAN, store, workers=1)
    assert len(Store.open(store).cases) == 6


def test_one_bad_case_is_named_and_the_others_are_kept(dataset: Dataset, tmp_path: Path) -> None:
    store = tmp_path / "store"
    good = dataset.cases[4].images[0].read_bytes()
    dataset.cases[4].images[0].write_bytes(good[: len(good) // 2])
    with pytest.raises(UserError, match="ct_4"):
        prepare(dataset, PLAN, store, workers=1)
    dataset.cases[4].images[0].write_bytes(good)
    assert redone(store, dataset) == ["ct_4", "ct_5"]


def test_a_store_of_cases_old_and_new_does_not_open(dataset: Dataset, tmp_path: Path) -> None:
    store = tmp_path / "store"
    prepare(dataset, PLAN, store, workers=1)
    before = Store.open(store)
    assert len({case.source for case in before.cases}) == 6
    shutil.copy(dataset.cases[0].images[0], dataset.cases[1].images[0])
    shutil.copy(dataset.cases[0].label, dataset.cases[1].label)
    good = dataset.cases[4].label.read_bytes()
    dataset.cases[4].label.write_bytes(b"")
    with pytest.raises(UserError, match="ct_4"):
        prepare(dataset, PLAN, store, workers=1)
    with pytest.raises(UserError, match=r"case `ct_1`.*not the one"):
        Store.open(store)
    dataset.cases[4].label.write_bytes(good)
    assert redone(store, dataset) == []
    assert [a.source == b.source for a, b in zip(Store.open(store).cases, before.cases, strict=True)] == [
        True, False, True, True, True, True
    ]  # fmt: skip


def test_exchanged_folders_of_cases_are_noticed(dataset: Dataset, tmp_path: Path) -> None:
    store = tmp_path / "store"
    prepare(dataset, PLAN, store, workers=1)
    for old, new in (("ct_0", "x"), ("ct_1", "ct_0"), ("x", "ct_1")):
        (store / "cases" / old).rename(store / "cases" / new)
    with pytest.raises(UserError, match=r"case `ct_0`.*not the one"):
        Store.open(store)
    assert redone(store, dataset) == ["ct_0", "ct_1"]
    Store.open(store)


def test_a_label_on_another_grid_or_with_unknown_ids_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    label = nibabel.load(dataset.cases[1].label)
    array, affine = np.asarray(label.dataobj), label.affine.copy()
    affine[2, 3] += 30
    nibabel.save(nibabel.Nifti1Image(array, affine), dataset.cases[1].label)
    with pytest.raises(UserError, match=r"case `ct_1`.*not on the grid.*30 mm"):
        prepare(dataset, PLAN, tmp_path / "store", workers=1)
    array[0, 0, 0] = 77
    array[10, 10, 10] = 77
    nibabel.save(nibabel.Nifti1Image(array, label.affine), dataset.cases[1].label)
    with pytest.raises(UserError, match=r"case `ct_1`.*77"):
        prepare(dataset, PLAN, tmp_path / "store", workers=1)


def test_classes_without_any_label_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    cases = (Case("a", (tmp_path / "a.nii",), None, "a", "training", None),)
    with pytest.raises(UserError, match="no labelled case"):
        prepare(Dataset("x", tmp_path, cases, {0: "background", 1: "liver"}, ()), PLAN, tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_two_at_once_on_one_store_are_refused(dataset: Dataset, tmp_path: Path) -> None:
    def again(done: int, total: int, name: str) -> None:
        with pytest.raises(UserError, match="another process"):
            prepare(dataset, PLAN, tmp_path / "store", workers=1)

    prepare(dataset, PLAN, tmp_path / "store", workers=1, progress=again)


def without_labels(dataset: Dataset) -> Dataset:
    return replace(dataset, cases=tuple(replace(case, label=None) for case in dataset.cases), labels={})


def test_a_store_without_labels_holds_the_same_images_and_no_air_to_centre_on(
    dataset: Dataset, tmp_path: Path
) -> None:
    with_labels, without = tmp_path / "with", tmp_path / "without"
    prepare(dataset, PLAN, with_labels, workers=1)
    # a plan of labelled scans serves: the network is fine-tuned with what it was pre-trained with
    prepare(without_labels(dataset), PLAN, without, workers=1)
    store = Store.open(without)
    assert store.plan == PLAN.model_copy(update={"classes": ()}) and len(store.cases) == 6
    for ours, theirs in zip(store.cases, Store.open(with_labels).cases, strict=True):
        assert np.array_equal(ours.whole_image(), theirs.whole_image()) and ours.split == theirs.split
        assert ours.label_file is None and ours.counts == (np.prod(ours.shape),)
        assert not ours.label((0, 0, 0), ours.shape).any()
        x, y, z = ours.centres(0).T
        assert len(x) > 1000 and (ours.whole_image()[0, x, y, z] > 0).all()
        assert (ours.path / "label.chunks").stat().st_size < 1000
    assert redone(without, without_labels(dataset)) == []


def test_labels_need_a_plan_with_classes(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the plan has no classes, but `phantom` has labels") as caught:
        prepare(dataset, PLAN.model_copy(update={"classes": ()}), tmp_path / "store", workers=1)
    assert "--unlabelled" in caught.value.hint and not (tmp_path / "store").exists()
