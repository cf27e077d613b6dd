"""From folders of label maps to metrics.csv, metrics.json and report.html."""

from __future__ import annotations

import csv
import hashlib
import html
import json
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from unetrkit.data.datalist import Case, Dataset, read_dataset
from unetrkit.data.plan import LabelClass
from unetrkit.errors import UserError
from unetrkit.evaluation.evaluate import _ids, _inert, evaluate
from unetrkit.evaluation.metrics import case_metrics

AFFINE = np.array([[-1.5, 0, 0, 20], [0, -1.5, 0, 10], [0, 0, 3.0, -5], [0, 0, 0, 1.0]])  # LPS
NAMES = {0: "background", 1: "liver", 2: "<script>alert('spleen')</script>", 9: "a $ cyst & more"}
PLAN = {
    "dataset": "phantom",
    "channels": ["CT"],
    "classes": [{"id": i, "name": name} for i, name in NAMES.items()],
    "spacing": [1.5, 1.5, 3.0],
    "intensity": [{"kind": "window", "lower": -100.0, "upper": 200.0}],
    "patch_size": [32, 32, 32],
}


def write(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def label_map(seed: int) -> np.ndarray:
    label = np.zeros((24, 20, 12), np.uint8)
    at = seed % 3
    label[3 + at : 11, 4:12, 2:9] = 1
    label[14:20, 10 : 15 + at, 3:8] = 2
    return label


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three cases of two subjects: the first is right, the second misses organ 2, the third adds organ 9."""
    rng = np.random.default_rng(0)
    for k, name in enumerate("abc"):
        label = label_map(k)
        write(
            tmp_path / f"images/{name}.nii.gz", (label * 50 + rng.normal(0, 9, label.shape)).astype(np.int16)
        )
        write(tmp_path / f"labels/{name}.nii.gz", label)
        prediction = np.roll(label, k, axis=0)
        if name == "b":
            prediction[prediction == 2] = 0
        if name == "c":
            prediction[0:2, 0:2, 0:3] = 9
        write(tmp_path / f"predictions/{name}.nii.gz", prediction)
    return tmp_path


def dataset(folder: Path, labels: dict[int, str] = NAMES, split: str = "validation") -> Dataset:
    subjects = {"a": "one", "b": "two", "c": "two"}
    cases = tuple(
        Case(name, (folder / f"images/{name}.nii.gz",), folder / f"labels/{name}.nii.gz", subject, split)  # type: ignore[arg-type]
        for name, subject in subjects.items()
    )
    return Dataset("phantom <b>", folder, cases, labels, ("CT",))


def run_folder(folder: Path) -> Path:
    run = folder / "run"
    (run / "model").mkdir(parents=True)
    (run / "model/model.json").write_text(json.dumps({"plan": PLAN}))
    (run / "model/weights.safetensors").write_bytes(b"weights")
    (run / "config.yaml").write_text("name: <i>swin</i>\n")
    records = [{"step": s, "event": "train", "loss": 2 / s, "lr": 1e-3, "note": None} for s in range(1, 90)]
    records += [
        {"step": 50, "validation": {"dice": 0.5, "organs": {"liver": 0.5}}},
        {"step": 89, "dice": 0.6},
    ]
    lines = [json.dumps(record) for record in records]
    (run / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 90, "lo']))
    return run


def rows(out: Path) -> list[dict[str, str]]:
    with open(out / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_csv_json_and_summary_say_what_case_metrics_says(folder: Path) -> None:
    told: list[tuple[object, ...]] = []
    summary = evaluate(
        folder / "predictions", dataset(folder), folder / "out", progress=lambda *news: told.append(news)
    )
    assert told == [(1, 3, "a"), (2, 3, "b"), (3, 3, "c")]
    classes = [LabelClass(id=i, name=name) for i, name in NAMES.items()]
    table = rows(folder / "out")
    document = json.loads((folder / "out/metrics.json").read_text())
    assert len(table) == 9
    for case, written in zip(summary.cases, document["cases"], strict=True):
        truth, prediction = (
            np.asarray(nib.load(folder / f"{where}/{case.name}.nii.gz").dataobj)
            for where in ("labels", "predictions")
        )
        expected = case_metrics(truth, prediction, (1.5, 1.5, 3.0), classes)
        assert list(case.organs) == expected
        assert [organ["hd95_mm"] for organ in written["organs"]] == [organ.hd95_mm for organ in expected]
        cells = [row for row in table if row["case"] == case.name]
        assert [row["status"] for row in cells] == [organ.status for organ in expected]
        for row, organ in zip(cells, expected, strict=True):
            for column in ("dice", "nsd", "assd_mm", "truth_ml"):
                value = getattr(organ, column)
                assert (
                    row[column] == ""
                    if value is None
                    else float(row[column]) == pytest.approx(value, rel=1e-5)
                )
    assert [o.missed for o in summary.organs] == [0, 1, 0]
    assert [o.false_positives for o in summary.organs] == [0, 0, 1]
    assert document["summary"]["mean"]["dice"]["mean"] == summary.mean["dice"].mean
    assert document["summary"]["subjects"] == 2
    assert document["tolerance_mm"] == 2.0
    assert sorted(document["cases"][0]["sha256"]) == ["image 0", "label", "prediction"]


def test_processes_give_the_same_files_as_one(folder: Path) -> None:
    alone = evaluate(folder / "predictions", dataset(folder), folder / "one", workers=1)
    assert evaluate(folder / "predictions", dataset(folder), folder / "two", workers=2) == alone
    assert (folder / "one/metrics.csv").read_bytes() == (folder / "two/metrics.csv").read_bytes()


def test_a_second_evaluation_replaces_the_first(folder: Path) -> None:
    evaluate(folder / "predictions", dataset(folder), folder / "out")
    before = (folder / "out/metrics.csv").read_bytes()
    evaluate(folder / "predictions", dataset(folder), folder / "out", tolerance_mm={1: 50.0})
    assert (folder / "out/metrics.csv").read_bytes() != before
    assert sorted(p.name for p in (folder / "out").iterdir()) == [
        "metrics.csv",
        "metrics.json",
        "report.html",
    ]
    assert json.loads((folder / "out/metrics.json").read_text())["tolerance_mm"] == {"1": 50.0}


def test_a_label_in_another_axis_order_is_the_same_label(folder: Path) -> None:
    image = nib.load(folder / "predictions/a.nii.gz")
    turned = image.as_reoriented(nib.orientations.axcodes2ornt("SAR"))  # a permutation with flips
    path = folder / "labels/a.nii.gz"
    turned = nib.Nifti1Image(np.asarray(turned.dataobj), turned.affine)
    path.unlink()
    nib.save(turned, path)
    assert nib.aff2axcodes(nib.load(path).affine) != ("L", "P", "S")
    summary = evaluate(folder / "predictions", dataset(folder), folder / "out")
    assert summary.cases[0].dice == 1.0


def test_without_declared_labels_the_run_names_them_and_else_their_ids(folder: Path) -> None:
    undeclared = dataset(folder, labels={})
    named = evaluate(folder / "predictions", undeclared, folder / "named", run=run_folder(folder))
    assert [o.name for o in named.organs] == [NAMES[1], NAMES[2], NAMES[9]]
    summary = evaluate(folder / "predictions", undeclared, folder / "out")
    assert [(o.id, o.name) for o in summary.organs] == [(1, "label 1"), (2, "label 2")]
    assert json.loads((folder / "out/metrics.json").read_text())["notes"] == [
        "Label ids that no class declares, counted as background: 9."
    ]


def record_predictions(folder: Path, **sha256: str) -> None:
    cases = {name: {"models": [{"sha256": one}], "settings": {}} for name, one in sha256.items()}
    (folder / "predictions/predictions.json").write_text(json.dumps({"cases": cases}))


def test_predictions_of_several_models_are_noted(folder: Path) -> None:
    record_predictions(folder, a="1", b="2")
    summary = evaluate(folder / "predictions", dataset(folder), folder / "out")
    assert summary.notes == (
        "The predictions are of 2 different models: see predictions.json.",
        "1 of 3 scored cases are not in predictions.json.",
    )
    assert summary.notes[0] in (folder / "out/report.html").read_text()


def test_a_run_that_did_not_predict_is_refused_and_its_training_cases_are_noted(folder: Path) -> None:
    run = run_folder(folder)
    (run / "run.json").write_text(json.dumps({"training": ["a", "c", "z"]}))
    own = hashlib.sha256((run / "model/weights.safetensors").read_bytes()).hexdigest()
    record_predictions(folder, a=own, b=own, c=own)
    note = "2 of 3 scored cases were trained on: these figures say nothing about new scans."
    for path in (run, run / "model"):
        summary = evaluate(folder / "predictions", dataset(folder), folder / "out", run=path)
        assert summary.notes == (note,)
        assert note in summary.table()
        assert json.loads((folder / "out/metrics.json").read_text())["notes"] == [note]
    record_predictions(folder, a=own, b="another", c=own)
    with pytest.raises(UserError, match="1 of 3 cases, such as `b`, were predicted with another model"):
        evaluate(folder / "predictions", dataset(folder), folder / "out", run=run)


def test_part_of_the_labelled_cases_is_noted(folder: Path) -> None:
    (folder / "predictions/b.nii.gz").unlink()
    (folder / "predictions/c.nii.gz").unlink()
    summary = evaluate(folder / "predictions", dataset(folder, split="training"), folder / "out")
    assert summary.notes == ("1 of 3 labelled cases were predicted.",)


def test_cases_without_a_label_are_left_out_and_noted(folder: Path) -> None:
    cases = dataset(folder, split="training").cases
    cases = (*cases[:2], Case("c", cases[2].images, None, "two", "test"))
    summary = evaluate(folder / "predictions", Dataset("x", folder, cases, NAMES, ("CT",)), folder / "out")
    assert [case.name for case in summary.cases] == ["a", "b"]
    assert "Predicted cases without a label, left out: 1." in (folder / "out/report.html").read_text()


def test_nothing_but_background_is_still_a_report(folder: Path) -> None:
    empty = np.zeros((24, 20, 12), np.uint8)
    for path in [*folder.glob("labels/*.nii.gz"), *folder.glob("predictions/*.nii.gz")]:
        write(path, empty)
    summary = evaluate(folder / "predictions", dataset(folder), folder / "out")
    assert summary.mean["dice"].mean is None
    assert (folder / "out/report.html").is_file()


def spoil_missing(folder: Path) -> None:
    (folder / "predictions/b.nii.gz").unlink()


def spoil_stranger(folder: Path) -> None:
    write(folder / "predictions/zebra.nii.gz", label_map(0))


def spoil_empty(folder: Path) -> None:
    for path in folder.glob("predictions/*"):
        path.unlink()


def spoil_folder(folder: Path) -> None:
    spoil_empty(folder)
    (folder / "predictions").rmdir()


def spoil_grid(folder: Path) -> None:
    moved = AFFINE.copy()
    moved[0, 3] += 4
    write(folder / "predictions/b.nii.gz", label_map(1), moved)


def spoil_shape(folder: Path) -> None:
    write(folder / "predictions/b.nii.gz", label_map(1)[:-1])


def spoil_bytes(folder: Path) -> None:
    path = folder / "predictions/b.nii.gz"
    path.write_bytes(path.read_bytes()[:-30])


def spoil_out(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out/thesis.txt").write_text("years of work")


def spoil_out_file(folder: Path) -> None:
    (folder / "out").write_text("a file")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_missing, "no prediction for `b` of the validation split"),
        (spoil_stranger, "holds `zebra.nii.gz`, and no such case"),
        (spoil_empty, "holds no label map"),
        (spoil_folder, "there is no folder"),
        (spoil_grid, "predictions/b.nii.gz` is not on the grid of"),
        (spoil_shape, "predictions/b.nii.gz` is not on the grid of"),
        (spoil_bytes, "b.nii.gz"),
        (spoil_out, "holds `thesis.txt`, which no evaluation wrote"),
        (spoil_out_file, "is a file"),
    ],
)
def test_what_cannot_be_evaluated_is_said_and_nothing_is_written(
    folder: Path, spoil: object, message: str
) -> None:
    spoil(folder)  # type: ignore[operator]
    with pytest.raises(UserError) as caught:
        evaluate(folder / "predictions", dataset(folder), folder / "out")
    assert message in caught.value.message
    assert not (folder / "out/metrics.csv").exists()


def test_a_prediction_of_part_of_no_declared_split_is_evaluated(folder: Path) -> None:
    spoil_missing(folder)
    summary = evaluate(folder / "predictions", dataset(folder, split="training"), folder / "out")
    assert [case.name for case in summary.cases] == ["a", "c"]


@pytest.mark.parametrize("content", [None, {}, {"plan": {"dataset": "x"}}])
def test_a_folder_that_is_no_run_is_said(folder: Path, content: object) -> None:
    (folder / "run").mkdir()
    if content is not None:
        (folder / "run/model.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="run"):
        evaluate(folder / "predictions", dataset(folder), folder / "out", run=folder / "run")


class Page(HTMLParser):
    """Text, tags and everything that a browser would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [
            value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")
        ]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


@pytest.fixture
def report(folder: Path) -> Iterator[str]:
    evaluate(folder / "predictions", dataset(folder), folder / "out", run=run_folder(folder))
    yield (folder / "out/report.html").read_text()


def test_report_is_one_file_that_loads_nothing(report: str) -> None:
    page = Page(report)
    assert page.loads
    assert all(source.startswith("data:image/") for source in page.loads)
    assert not {"script", "link", "iframe", "object", "form"} & set(page.tags)
    assert "url(" not in report
    assert "@import" not in report
    assert len(report) < 3_000_000
    # Dice by organ, three cases in three planes, training curves
    kinds = [source.partition(";")[0] for source in page.loads]
    assert kinds == ["data:image/svg+xml"] + ["data:image/webp"] * 9 + ["data:image/svg+xml"]


def test_report_escapes_what_others_wrote(report: str) -> None:
    page = Page(report)
    assert "i" not in page.tags
    assert "<script" not in report
    for text in (NAMES[2], NAMES[9], "phantom <b>", "name: <i>swin</i>"):
        assert text in page.text
        assert html.escape(text, quote=False).replace("'", "&#39;") in report


def test_report_shows_the_figures_of_the_csv(report: str, folder: Path) -> None:
    text = Page(report).text
    table = rows(folder / "out")
    liver = [float(row["dice"]) for row in table if row["organ"] == "liver"]
    assert f"liver 3 {np.mean(liver):.3f}" in text
    summary = json.loads((folder / "out/metrics.json").read_text())["summary"]
    assert f"Mean Dice {summary['mean']['dice']['mean']:.3f}" in text
    assert "missed" in text
    assert "false +" in text
    for name in ("weights", "plan", "images and labels", "predictions"):
        assert f"SHA-256, {name}" in text
    assert "torch" in text
    assert "unetrkit" in text


def test_a_perfect_prediction_of_real_scans_is_perfect(shared_data: Path, tmp_path: Path) -> None:
    real = read_dataset(shared_data / "ct_openkbp_hn" / "dataset.json")
    training = [case for case in real.cases if case.split == "training"][:2]
    for case in training:
        assert case.label is not None
        (tmp_path / "predictions").mkdir(exist_ok=True)
        (tmp_path / f"predictions/{case.name}.nii.gz").write_bytes(case.label.read_bytes())
    summary = evaluate(tmp_path / "predictions", real, tmp_path / "out")
    assert len(summary.cases) == 2
    assert summary.mean["dice"].mean == 1.0
    assert summary.mean["hd95_mm"].mean == 0.0
    assert summary.mean["nsd"].mean == 1.0


def test_no_cell_is_a_formula_and_numbers_stay() -> None:
    cells = ["=1+1", "+cmd", "-cmd|' /C calc'!A0", "@x", "-1.5", "a=1", -2, "-1e-05"]
    assert [_inert(cell) for cell in cells[:4]] == [f"'{cell}" for cell in cells[:4]]
    assert [_inert(cell) for cell in cells[4:]] == cells[4:]


def test_large_ids_take_no_memory() -> None:
    assert _ids(np.array([0, 5, 2**31 - 1], np.int32)) == {5, 2**31 - 1}


def test_a_report_that_cannot_be_written_leaves_the_earlier_files(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    evaluate(folder / "predictions", dataset(folder), folder / "out")
    before = {path.name: path.read_bytes() for path in (folder / "out").iterdir()}
    monkeypatch.setattr("unetrkit.evaluation.report.write_report", full)
    with pytest.raises(UserError, match="No space left"):
        evaluate(folder / "predictions", dataset(folder), folder / "out", tolerance_mm=1.0)
    assert {path.name: path.read_bytes() for path in (folder / "out").iterdir()} == before
