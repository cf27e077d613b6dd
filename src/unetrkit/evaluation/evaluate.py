"""Predicted label maps against a data set's labels: metrics.csv, metrics.json and report.html."""

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from unetrkit.data.datalist import Dataset
from unetrkit.data.files import atomic_write, sha256_file, sync_folder, write_problems
from unetrkit.data.geometry import off_grid, reorient, spacing_of
from unetrkit.data.inspection import count_labels
from unetrkit.data.plan import LabelClass
from unetrkit.data.processes import map_cases
from unetrkit.data.volume import read_label
from unetrkit.errors import UserError
from unetrkit.evaluation.metrics import DEFAULT_TOLERANCE_MM, OrganMetrics, case_metrics
from unetrkit.evaluation.pairs import Pair, listed, pair_cases
from unetrkit.evaluation.provenance import Provenance, RunRecord, prediction_notes, read_run
from unetrkit.evaluation.summary import CaseMetrics, Summary, summarise
from unetrkit.progress import Progress

OUTPUTS = ("metrics.csv", "metrics.json", "report.html")


@dataclass(frozen=True)
class Measured:
    """What a worker found in one pair; `undeclared` are ids in its files that are no class."""

    metrics: CaseMetrics
    undeclared: tuple[int, ...]
    sha256: dict[str, str]


def evaluate(
    predictions: Path,
    dataset: Dataset,
    out: Path,
    *,
    tolerance_mm: float | Mapping[int, float] = DEFAULT_TOLERANCE_MM,
    workers: int | None = 1,
    run: Path | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Measure `predictions`/<case name>.nii.gz against the labels of `dataset`, on each case's own grid.

    Writes metrics.csv (a row per case and organ), metrics.json (the same, the summary, the definitions and
    what it was computed from) and report.html into `out`; all appear whole or none does. `run`, a run or
    model folder, adds names, intensity window and training curves. `progress(done, total, note)` hears of
    each case.

    Raises UserError where a prediction belongs to no case, where a declared validation or test split is only
    partly predicted, where predictions.json names another model than that of `run`, where grids differ, and
    where `out` holds anything but an earlier evaluation.
    """
    from unetrkit.evaluation.report import write_report
    from unetrkit.evaluation.views import worst_views

    _check_out(out)
    pairs, notes = pair_cases(predictions, dataset)
    record = read_run(run) if run is not None else RunRecord()
    notes += prediction_notes(predictions, [pair.name for pair in pairs], record)
    classes = _classes(pairs, dataset, record)
    measure = partial(_measure, classes=classes, tolerance_mm=tolerance_mm)
    measured = map_cases(measure, pairs, workers, progress)
    ids = sorted({i for m in measured for i in m.undeclared})
    some = ", ".join(map(str, ids[:20])) + (", …" if len(ids) > 20 else "")
    notes += [f"Label ids that no class declares, counted as background: {some}."] if ids else []
    summary = replace(summarise([m.metrics for m in measured]), notes=tuple(notes))
    hashes = record.hashes | _data_hashes(measured)
    provenance = Provenance(dataset.name, tolerance_mm, notes, hashes)

    with write_problems(out):
        out.mkdir(parents=True, exist_ok=True)
    views = worst_views(pairs, summary, record.plan)
    # all three or none: figures beside an older report would contradict it
    with write_problems(out), TemporaryDirectory(prefix=".", dir=out) as temporary:
        staged = Path(temporary)
        atomic_write(staged / "metrics.csv", _csv(summary).encode())
        atomic_write(staged / "metrics.json", _json(summary, provenance, pairs, measured).encode())
        write_report(staged / "report.html", summary, provenance, views, record)
        for name in OUTPUTS:
            os.replace(staged / name, out / name)
        sync_folder(out)
    return summary


def _measure(
    pair: Pair, classes: Sequence[LabelClass], tolerance_mm: float | Mapping[int, float]
) -> Measured:
    truth = read_label(pair.label)
    # a label may be stored in another axis order than its image, and the prediction is on the image's grid
    prediction = reorient(read_label(pair.prediction), truth.affine)
    if difference := off_grid(truth, prediction):
        hint = "metrics are taken on the case's own grid; `unetrkit predict` writes its label maps there"
        raise UserError(f"`{pair.prediction}` is not on the grid of `{pair.label}`: {difference}", hint=hint)
    spacing = spacing_of(truth.affine)
    organs = case_metrics(truth.array[0], prediction.array[0], spacing, classes, tolerance_mm)
    undeclared = (_ids(truth.array) | _ids(prediction.array)) - {c.id for c in classes}
    files = {"label": pair.label, "prediction": pair.prediction}
    files |= {f"image {k}": path for k, path in enumerate(pair.case.images)}
    hashes = {name: sha256_file(path) for name, path in files.items() if path.is_file()}
    metrics = CaseMetrics(pair.name, pair.case.subject, tuple(organs))
    return Measured(metrics, tuple(sorted(undeclared)), hashes)


def _classes(pairs: Sequence[Pair], dataset: Dataset, record: RunRecord) -> list[LabelClass]:
    """The organs: those the data set declares, else those of the run's plan, else the ids in the labels."""
    if dataset.labels:
        return [LabelClass(id=i, name=name) for i, name in sorted(dataset.labels.items()) if i != 0]
    if record.plan is not None:
        return [c for c in record.plan.classes if c.id != 0]
    ids = set().union(*(_ids(read_label(pair.label).array) for pair in pairs))
    return [LabelClass(id=i, name=f"label {i}") for i in sorted(ids)]


def _ids(labels: np.ndarray) -> set[int]:
    """The ids in an array, without the background."""
    return set(count_labels(labels)) - {0}


def _check_out(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"`{out}` is a file, the report is a folder", hint="name an empty or new folder")
    names = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    foreign = [name for name in names if name not in OUTPUTS and not name.startswith(".")]
    if foreign:
        message = f"`{out}` holds {listed(foreign)}, which no evaluation wrote"
        raise UserError(message, hint="name an empty or new folder")


def _data_hashes(measured: Sequence[Measured]) -> dict[str, str]:
    """One hash for all files of a kind, to see at a glance whether two evaluations had the same cases."""
    texts = {"images and labels": "", "predictions": ""}
    for m in measured:
        for name, digest in sorted(m.sha256.items()):
            kind = "predictions" if name == "prediction" else "images and labels"
            texts[kind] += f"{m.metrics.name} {name} {digest}\n"
    return {kind: hashlib.sha256(text.encode()).hexdigest() for kind, text in texts.items()}


def _csv(summary: Summary) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = [field.name for field in fields(OrganMetrics)]
    writer.writerow(["case", "subject", *("organ" if c == "name" else c for c in columns)])
    for case in summary.cases:
        for organ in case.organs:
            values = (getattr(organ, column) for column in columns)
            # numbers to 6 digits; undefined is an empty cell
            cells = (f"{value:.6g}" if isinstance(value, float) else value for value in values)
            writer.writerow(map(_inert, (case.name, case.subject, *cells)))
    return text.getvalue()


def _inert(cell: object) -> object:
    """A cell that no spreadsheet takes for a formula; a number may begin with its sign."""
    return f"'{cell}" if re.match(r"[=+\-@](?![\d.]+(e|$))", str(cell)) else cell


def _json(
    summary: Summary, provenance: Provenance, pairs: Sequence[Pair], measured: Sequence[Measured]
) -> str:
    cases = []
    for pair, m in zip(pairs, measured, strict=True):
        files = {"label": str(pair.label), "prediction": str(pair.prediction), "sha256": m.sha256}
        cases.append({**asdict(m.metrics), "dice": m.metrics.dice, **files})
    document = {
        "format": "unetrkit evaluation",
        "version": 1,
        **asdict(provenance),
        "summary": {
            "subjects": summary.subjects,
            "mean": {metric: asdict(estimate) for metric, estimate in summary.mean.items()},
            "organs": [asdict(organ) for organ in summary.organs],
        },
        "cases": cases,
    }
    return json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
