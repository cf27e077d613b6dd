"""The check of a data set: what it must find, and that it is silent where nothing is wrong."""

from __future__ import annotations

import gzip
import io
import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import permutations, product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from rich.console import Console

from unetrkit.data.check import Report, check
from unetrkit.data.check_report import print_report
from unetrkit.data.datalist import Case, Dataset, read_dataset
from unetrkit.data.inspection import voxel_digest

AFFINE = np.array([[-2.0, 0, 0, 30], [0, -2, 0, 40], [0, 0, 3, -50], [0, 0, 0, 1]])
SHAPE = (12, 11, 10)
CLASSES = {0: "background", 1: "liver", 2: "spleen"}


def image_of(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1000, 1000, SHAPE, dtype=np.int16)


def label_of(seed: int) -> np.ndarray:
    return np.random.default_rng(seed + 1000).integers(0, 3, SHAPE, dtype=np.uint8)


def save(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """Six sound cases: four for training, one for validation, one test case without a label."""
    cases = []
    for k, split in enumerate(["training"] * 4 + ["validation", "test"]):
        image = save(tmp_path / f"images/c{k}.nii.gz", image_of(k))
        label = None if split == "test" else save(tmp_path / f"labels/c{k}.nii.gz", label_of(k))
        cases.append(Case(f"c{k}", (image,), label, f"c{k}", split))  # type: ignore[arg-type]
    return Dataset("six", tmp_path, tuple(cases), CLASSES, ("CT",))


def with_case(dataset: Dataset, k: int, **changes: object) -> Dataset:
    cases = list(dataset.cases)
    cases[k] = replace(cases[k], **changes)  # type: ignore[arg-type]
    return replace(dataset, cases=tuple(cases))


def codes(report: Report) -> list[tuple[str, str, str]]:
    return [(finding.severity, finding.code, finding.case) for finding in report.findings]


def printed(report: Report) -> str:
    console = Console(file=io.StringIO(), width=110)
    print_report(report, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_sound_data_set_has_no_findings_and_its_facts_are_right(dataset):
    report = check(dataset, workers=1)
    assert report.findings == ()
    facts = report.cases[2]
    assert (facts.shape, facts.spacing, facts.axes, facts.dtype) == (SHAPE, (2.0, 2.0, 3.0), "LPS", "int16")
    image = image_of(2)
    assert facts.channels[0].minimum == image.min()
    assert facts.channels[0].high == pytest.approx(np.percentile(image, 99.5))
    assert facts.counts == {value: int((label_of(2) == value).sum()) for value in range(3)}
    assert report.cases[5].counts is None


def test_the_number_of_workers_changes_nothing_and_progress_counts_to_the_end(dataset):
    seen: list[tuple[int, int]] = []
    report = check(dataset, workers=2, progress=lambda done, total, name: seen.append((done, total)))
    assert report == check(dataset, workers=1)
    assert seen == [(k, 6) for k in range(1, 7)]


def test_the_report_is_json_without_gaps(dataset):
    (dataset.cases[1].images[0]).write_bytes(b"")
    content = json.loads(json.dumps(check(dataset, workers=1).to_dict(), allow_nan=False))
    assert [case["name"] for case in content["cases"]] == [f"c{k}" for k in range(6)]
    assert content["cases"][0]["label_voxels"]["1"] == int((label_of(0) == 1).sum())
    assert content["cases"][1]["shape"] is None
    assert [finding["code"] for finding in content["findings"]] == ["image"]


Change = Callable[[Path], object]


def _header(path: Path, sform: int, qform: int) -> None:
    image = nib.Nifti1Image(image_of(1), AFFINE)
    image.set_sform(AFFINE, sform)
    image.set_qform(AFFINE, qform)
    nib.save(image, path)


def _flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


IMAGE_FAULTS: dict[str, tuple[Change, list[tuple[str, str]], str]] = {
    "empty file": (lambda p: p.write_bytes(b""), [("error", "image")], "is empty"),
    "web page": (lambda p: p.write_text("<html>"), [("error", "image")], "c1.nii.gz"),
    "cut": (lambda p: p.write_bytes(p.read_bytes()[:-400]), [("error", "image")], "truncated"),
    "damaged": (_flip_a_byte, [("error", "image")], "c1.nii.gz"),
    "gone": (lambda p: p.unlink(), [("error", "image")], "there is no file"),
    "NaN": (lambda p: save(p, np.full(SHAPE, np.nan, np.float32)), [("error", "image")], "not finite"),
    "constant": (
        lambda p: save(p, np.full(SHAPE, 7, np.int16)),
        [("error", "constant")],
        "is 7 in every voxel",
    ),
    "channels": (
        lambda p: save(p, np.stack([image_of(1)] * 2, axis=-1)),
        [("error", "channels")],
        "case `c1` has 2 channels, not 1",
    ),
    "shape": (
        lambda p: save(p, image_of(1)[:, :, :9]),
        [("error", "geometry")],
        "labels/c1.nii.gz` is not on the grid of image .*images/c1.nii.gz`: its shape is 12x11x10",
    ),
    "origin": (
        lambda p: save(p, image_of(1), AFFINE + _shift(0.5)),
        [("error", "geometry")],
        "its origin is 0.5 mm away",
    ),
    "mirrored header": (
        lambda p: save(p, image_of(1), AFFINE * np.array([-1.0, 1, 1, 1])[:, None]),
        [("error", "geometry")],
        "not on the grid",
    ),
    "no form codes": (
        lambda p: _header(p, 0, 0),
        [("warning", "header"), ("error", "geometry")],
        "no orientation",
    ),
    "not HU": (lambda p: save(p, image_of(1) + 1000), [("warning", "units")], "none below 0: not HU"),
    "rescaled twice": (lambda p: save(p, image_of(1) * 12.0), [("warning", "units")], "too far for HU"),
    "other scale": (
        lambda p: save(p, (image_of(1) / 1000).astype(np.float32)),
        [("warning", "range")],
        "over 100 times off the others",
    ),
}


def _shift(mm: float) -> np.ndarray:
    shift = np.zeros((4, 4))
    shift[0, 3] = mm
    return shift


@pytest.mark.parametrize("fault", IMAGE_FAULTS)
def test_a_fault_of_an_image_is_found_once_and_named(dataset, fault):
    change, expected, message = IMAGE_FAULTS[fault]
    change(dataset.cases[1].images[0])
    report = check(dataset, workers=1)
    assert codes(report) == [(severity, code, "c1") for severity, code in expected]
    assert re.search(message, report.findings[0].message)
    assert expected[0][1] in printed(report)


LABEL_FAULTS: dict[str, tuple[Change, tuple[str, str], str]] = {
    "fraction": (lambda p: save(p, label_of(1) * 0.5), ("error", "label"), "not whole numbers"),
    "negative": (lambda p: save(p, label_of(1).astype(np.int16) - 1), ("error", "label"), "negative"),
    "NaN": (lambda p: save(p, np.full(SHAPE, np.nan, np.float32)), ("error", "label"), "NaN"),
    "text": (lambda p: p.write_text("no"), ("error", "label"), "c1.nii.gz"),
    "unknown": (
        lambda p: save(p, np.where(np.arange(1320).reshape(SHAPE) < 4, 255, label_of(1)).astype(np.uint8)),
        ("error", "values"),
        r"not declared: 255 \(4 voxels\)",
    ),
    "empty": (lambda p: save(p, np.zeros(SHAPE, np.uint8)), ("warning", "empty"), "no voxel but background"),
    "shape": (lambda p: save(p, label_of(1)[:-1]), ("error", "geometry"), "11x11x10 instead of 12x11x10"),
}


@pytest.mark.parametrize("fault", LABEL_FAULTS)
def test_a_fault_of_a_label_is_found_once_and_named(dataset, fault):
    change, (severity, code), message = LABEL_FAULTS[fault]
    change(dataset.cases[1].label)
    report = check(dataset, workers=1)
    assert codes(report) == [(severity, code, "c1")]
    assert re.search(message, report.findings[0].message)


def test_rounding_in_a_label_and_its_header_is_no_fault(dataset):
    label = label_of(1).astype(np.float32)
    label[label == 1] = np.float32(0.99999994)
    save(dataset.cases[1].label, label, AFFINE + _shift(0.01))
    report = check(dataset, workers=1)
    assert report.findings == ()
    assert report.cases[1].counts == {value: int((label_of(1) == value).sum()) for value in range(3)}


def test_a_label_stored_in_another_axis_order_is_no_fault(dataset):
    stored = nib.Nifti1Image(label_of(1), AFFINE)
    nib.save(stored.as_reoriented(np.array([[2, 1], [0, -1], [1, 1]])), dataset.cases[1].label)
    assert check(dataset, workers=1).findings == ()


def test_channels_on_different_grids_are_refused_with_both_names(dataset, tmp_path):
    second = save(tmp_path / "images/c0_pet.nii.gz", image_of(9)[:6])
    changed = with_case(replace(dataset, cases=dataset.cases[:1], channels=("CT", "PET")), 0)
    changed = with_case(changed, 0, images=(dataset.cases[0].images[0], second))
    finding, _ = check(changed, workers=1).findings
    assert finding.severity == "error"
    assert "c0_pet.nii.gz" in finding.message
    assert "c0.nii.gz" in finding.message
    assert "shape is 6x11x10 instead of 12x11x10" in finding.message


def _resave(array: np.ndarray, source: Path, target: Path) -> None:
    target.write_bytes(gzip.compress(gzip.decompress(source.read_bytes()), compresslevel=1))


COPIES: dict[str, Callable[[np.ndarray, Path, Path], object]] = {
    "copied": lambda array, source, target: shutil.copy(source, target),
    "compressed again": _resave,
    "as float": lambda array, source, target: save(target, array.astype(np.float64)),
    "other header": lambda array, source, target: save(target, array, np.diag([1.0, 1.0, 5.0, 1.0])),
    "flipped header": lambda array, source, target: save(target, array, AFFINE @ np.diag([-1.0, 1, 1, 1])),
    "mirrored": lambda array, source, target: save(target, array[::-1]),
    "other axes": lambda array, source, target: nib.save(
        nib.Nifti1Image(array, AFFINE).as_reoriented(np.array([[1, -1], [2, 1], [0, 1]])), target
    ),
}


@pytest.mark.parametrize("copy", COPIES)
def test_the_same_voxels_in_two_splits_are_an_error_however_they_were_saved(dataset, copy):
    source, target = dataset.cases[0], dataset.cases[5]
    COPIES[copy](image_of(0), source.images[0], target.images[0])
    report = check(dataset, workers=1)
    assert codes(report) == [("error", "duplicate", "c5")]
    assert (
        "case `c5` has the same voxels as `c0`, but is in test and that in training"
        in report.errors[0].message
    )


def test_the_same_voxels_in_one_split_are_a_warning_and_in_two_declared_folds_an_error(dataset):
    shutil.copy(dataset.cases[0].images[0], dataset.cases[1].images[0])
    assert codes(check(dataset, workers=1)) == [("warning", "duplicate", "c1")]
    folded = with_case(with_case(dataset, 0, fold=0), 1, fold=1)
    assert codes(check(folded, workers=1)) == [("error", "duplicate", "c1")]


def test_the_digest_is_the_same_for_all_48_orders_of_the_axes_and_no_other_volume():
    array = image_of(3)[None].astype(np.float32)
    turned = {
        voxel_digest(array.transpose(0, *(1 + axis for axis in axes))[:, ::x, ::y, ::z])
        for axes in permutations(range(3))
        for x, y, z in product((1, -1), repeat=3)
    }
    assert turned == {voxel_digest(np.ascontiguousarray(array))}
    changed = array.copy()
    changed[0, 5, 5, 5] += 1
    others = [changed, array[:, :-1], array.reshape(1, 24, 11, 5), np.concatenate([array, array])]
    assert len({voxel_digest(other) for other in others} | turned) == 5
    assert voxel_digest(np.zeros((1, 8, 8, 8))) == voxel_digest(-np.zeros((1, 8, 8, 8)))


def test_the_digest_does_not_depend_on_where_the_chunks_end(monkeypatch):
    array = image_of(3)[None].astype(np.float32)
    whole = voxel_digest(array)
    monkeypatch.setattr("unetrkit.data.inspection.CHUNK", 7)
    assert voxel_digest(array) == whole


def test_a_subject_in_two_splits_or_folds_is_an_error(dataset):
    changed = with_case(with_case(dataset, 0, subject="ann", fold=0), 4, subject="ann")
    changed = with_case(with_case(changed, 1, subject="ben", fold=0), 2, subject="ben", fold=1)
    report = check(changed, workers=1)
    assert codes(report) == [("error", "subject", "c2"), ("error", "subject", "c4")]
    assert "subject `ann` is in training fold 0 (`c0`) and in validation (`c4`)" in report.errors[1].message


@pytest.mark.parametrize(
    ("kept", "changes", "words"),
    [
        ([5], {}, "no case has a label: there is nothing to train on"),
        ([0, 5], {"label": None}, "no case has a label"),
        ([0, 5], {}, "of one subject: none is left to validate on"),
        ([0, 1], {"subject": "s"}, "of one subject"),
        ([0, 1], {"fold": 2}, "of one fold"),
        ([4, 5], {}, "for validation: none is left to train on"),
        ([0, 1], {}, ""),
        ([0, 4], {}, ""),
    ],
)
def test_a_data_set_that_cannot_be_split_is_an_error(dataset, kept, changes, words):
    cases = tuple(replace(dataset.cases[k], **(changes if k < 4 else {})) for k in kept)
    found = [error.message for error in check(replace(dataset, cases=cases), workers=1).errors]
    assert len(found) == bool(words) and all(words in message for message in found)


def test_several_cases_of_a_subject_in_one_split_are_no_fault(dataset):
    assert check(with_case(dataset, 1, subject="c0"), workers=1).findings == ()


@pytest.mark.parametrize(
    ("affine", "shape", "code"),
    [
        (np.diag([2.0, 2.0, 10.0, 1.0]), SHAPE, "spacing"),
        (np.diag([2.0, 2.0, 3.0, 1.0]), (12, 11, 60), "extent"),
        (np.diag([2.0, 2.0, 3.0, 1.0]), (12, 11, 7), "size"),
        (np.diag([3.0, 2.0, 2.0, 1.0])[[2, 1, 0, 3]], (10, 11, 12), None),  # the same volume, stored S, A, R
    ],
)
def test_outlying_sizes_and_spacings_are_warnings(dataset, affine, shape, code):
    array = np.random.default_rng(5).integers(-1000, 1000, shape, dtype=np.int16)
    save(dataset.cases[5].images[0], array, affine)
    assert codes(check(dataset, workers=1)) == ([("warning", code, "c5")] if code else [])


def test_a_class_that_no_label_has_is_a_warning_of_the_data_set(dataset):
    report = check(replace(dataset, labels={**CLASSES, 7: "pancreas"}), workers=1)
    assert codes(report) == [("warning", "unused", "")]
    assert "`pancreas`" in report.warnings[0].message


def test_without_declared_classes_every_value_is_accepted(dataset):
    assert check(replace(dataset, labels={}), workers=1).findings == ()


def test_a_second_intensity_scale_is_one_warning_and_not_one_for_each_case(dataset):
    mr = replace(dataset, channels=("MR",))
    for k in (1, 4):
        save(dataset.cases[k].images[0], (image_of(k) * 1000.0).astype(np.float32))
    report = check(mr, workers=1)
    assert codes(report) == [("warning", "range", "")]
    assert "2 of 6 cases" in report.warnings[0].message


def test_a_file_outside_of_the_folder_is_a_warning(dataset, tmp_path):
    report = check(replace(dataset, root=tmp_path / "images"), workers=1)
    assert codes(report) == [("warning", "outside", f"c{k}") for k in range(5)]


def test_the_printed_report_is_short_and_keeps_brackets_in_names(dataset):
    renamed = replace(dataset, name="six [bold]", labels={**CLASSES, 2: "spleen [left]"})
    for k in range(5):
        save(dataset.cases[k].label, np.full(SHAPE, 9, np.uint8))
    text = printed(check(renamed, workers=1))
    assert "six [bold]" in text
    assert "spleen [left]" in text
    assert "4 training, 1 validation, 1 test; 5 with a label; 6 subjects; LPS; int16" in text
    assert text.count("error (values)") == 3
    assert "and 2 more: c3, c4" in text
    assert "hint: declared are 0-2; add to `labels`, or correct the file" in text
    assert text.rstrip().endswith("6 cases read: 5 errors, 1 warning")
    assert len(text.splitlines()) < 30


def test_real_data_sets_have_no_errors(shared_data):
    for name in (
        "mr_hippocampus/dataset_40_10.json",
        "ct_openkbp_hn/dataset.json",
        "spine_ct_mr/dataset.json",
    ):
        report = check(read_dataset(shared_data / name), workers=1)
        assert report.errors == (), name
        assert len(printed(report).splitlines()) < 40


def test_real_classes_that_nobody_has_drawn_are_named(shared_data):
    report = check(read_dataset(shared_data / "ct_openkbp_partial/dataset.json"), workers=1)
    assert codes(report) == [("warning", "unused", "")]
    assert "`Esophagus`, `Larynx`" in report.warnings[0].message


def test_real_channels_on_three_grids_are_refused(shared_data):
    report = check(read_dataset(shared_data / "multimodal_sts/dataset_multigrid.json"), workers=1)
    assert [(finding.severity, finding.code) for finding in report.findings] == [("error", "image")] * 3
    assert "its shape is 112x110x47 instead of 136x134x47" in report.errors[0].message


def awkward(shared_data: Path, names: Sequence[str]) -> Dataset:
    root = shared_data / "awkward"
    cases = tuple(Case(name, (root / name,), None, name, "training") for name in names)
    return Dataset("awkward", root, cases, {0: "background", 1: "brain"}, ("MR",))


def test_one_brain_in_six_orders_of_the_axes_is_found_five_times(shared_data):
    names = [f"orient_{axes}.nii.gz" for axes in ("RAS", "ASR", "LIP", "LPS", "PIL", "SAR")]
    report = check(awkward(shared_data, names), workers=1)
    assert codes(report)[1:] == [("warning", "duplicate", name) for name in names[1:]]
    assert {facts.shape for facts in report.cases} == {(64, 79, 67)}


def test_real_broken_files_are_findings_and_never_a_traceback(shared_data):
    broken = ["empty_file", "git_lfs_pointer", "not_gzip", "text_not_image", "truncated", "complex64"]
    report = check(awkward(shared_data, [f"{name}.nii.gz" for name in broken]), workers=1)
    assert [finding.code for finding in report.errors] == ["image"] * len(broken) + ["split"]
    for name, finding in zip(broken, report.errors, strict=False):
        assert f"{name}.nii.gz" in finding.message
    assert "6 cases read: 7 errors" in printed(report)


def test_a_list_without_labels_can_be_pretrained_on(dataset):
    images = replace(dataset, labels={}, cases=tuple(replace(case, label=None) for case in dataset.cases))
    report = check(images, workers=1)
    assert codes(report) == [("warning", "split", "")]
    assert "0 with a label" in printed(report)
    one = check(replace(images, cases=tuple(replace(case, subject="s") for case in images.cases[:2])))
    assert "all cases are of one subject: none is left to validate on" in one.errors[0].message
    tests = check(replace(images, cases=tuple(replace(case, split="test") for case in images.cases)))
    assert [finding.code for finding in tests.errors] == ["split"]
