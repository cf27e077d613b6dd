"""What an evaluation was computed from and how: enough to do it again and to notice what changed."""

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from unetrkit.data.copies import copy_of
from unetrkit.data.files import read_json, read_problems, sha256_file
from unetrkit.data.plan import Plan, parse_plan, plan_hash
from unetrkit.errors import UserError
from unetrkit.info import environment

RECORD = "predictions.json"
DEFINITIONS = {
    "dice": "2 |T ∩ P| / (|T| + |P|), T the voxels of the label, P those of the prediction",
    "iou": "|T ∩ P| / |T ∪ P|",
    "nsd": "normalised surface Dice: share of the boundary voxels of T and P within tolerance of the others",
    "hd95_mm": "larger of the two directed 95th percentiles of the distances between boundary voxels",
    "assd_mm": "mean of the distances of the boundary voxels of T and P to the others",
    "boundary": "voxels with one of 6 face neighbours outside the mask; distances (mm) between centres",
    "absent": "present but not predicted (missed), or predicted but not present (false positive): Dice, IoU "
    "and NSD are 0, distances are undefined and left out; neither present nor predicted: not counted",
    "mean": "mean of the organs' means, each over the cases where the metric is defined",
    "interval": "95 % percentile bootstrap, 2000 resamples of subjects; too narrow below about 10 subjects",
}


@dataclass(frozen=True)
class RunRecord:
    """What a run or model folder tells a report; everything is optional."""

    plan: Plan | None = None
    curves: tuple[dict[str, object], ...] = ()
    config: str = ""
    hashes: dict[str, str] = field(default_factory=dict)
    training: frozenset[str] = frozenset()  # names of cases


@dataclass(frozen=True)
class Provenance:
    """How the figures came about; part of metrics.json and of the report."""

    dataset: str
    tolerance_mm: float | Mapping[int, float]
    notes: Sequence[str]
    hashes: dict[str, str]
    definitions: dict[str, str] = field(default_factory=lambda: DEFINITIONS)
    environment: dict[str, str] = field(default_factory=environment)
    date: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    command: str = field(default_factory=lambda: shlex.join(["unetrkit", *sys.argv[1:]]))


def read_run(path: Path) -> RunRecord:
    """What is there of a run folder (model/, config.yaml, metrics.jsonl) or of a model folder."""
    path = copy_of(path, "reports")
    folder = path / "model" if (path / "model").is_dir() else path
    if not (folder / "model.json").is_file() and not (path / "metrics.jsonl").is_file():
        message = f"`{path}` is neither a run nor a model: it has no `model.json` and no `metrics.jsonl`"
        raise UserError(message, hint="name the folder that `unetrkit train` wrote")
    named = {
        "weights": folder / "weights.safetensors",
        "model description": folder / "model.json",
        "training settings": path / "config.yaml",
    }
    hashes = {name: sha256_file(file) for name, file in named.items() if file.is_file()}
    plan = None
    if (folder / "model.json").is_file():
        description = read_json(folder / "model.json")
        values = description.get("plan") if isinstance(description, dict) else None
        plan = parse_plan(values, f"the plan in `{folder / 'model.json'}`")
        hashes["plan"] = plan_hash(plan)
    home = path if (path / "run.json").is_file() else folder.parent  # `RUN/model` is of RUN
    run = read_json(home / "run.json") if (home / "run.json").is_file() else {}
    training = frozenset(run.get("training", ())) if isinstance(run, dict) else frozenset()
    return RunRecord(plan, read_curves(path / "metrics.jsonl"), _text(path / "config.yaml"), hashes, training)


def prediction_notes(predictions: Path, cases: Sequence[str], run: RunRecord) -> list[str]:
    """What a reader must know of how `cases` came about: several models, cases trained on.

    Raises UserError where `predictions`/predictions.json names another model than that of `run`.
    """
    path = predictions / RECORD
    content = read_json(path) if path.is_file() else {"cases": {}}
    try:
        made = {name: content["cases"][name] for name in cases if name in content["cases"]}  # type: ignore[index]
        weights = {name: [model["sha256"] for model in entry["models"]] for name, entry in made.items()}
        settings = {name: {**entry["settings"], "device": ""} for name, entry in made.items()}
    except (KeyError, TypeError) as error:
        raise UserError(f"`{path}` is not the record of a prediction", hint="predict again") from error
    notes = []
    expected = run.hashes.get("weights")
    others = [name for name, found in weights.items() if expected and expected not in found]
    if others:
        raise UserError(
            f"{len(others)} of {len(cases)} cases, such as `{others[0]}`, were predicted with another model",
            hint="give the run that predicted as `--run`, or predict again with `--overwrite`",
        )
    for what, found in (("models", weights.values()), ("settings", settings.values())):
        if (several := len({json.dumps(one, sort_keys=True) for one in found})) > 1:
            notes.append(f"The predictions are of {several} different {what}: see {RECORD}.")
    if made and len(made) < len(cases):
        notes.append(f"{len(cases) - len(made)} of {len(cases)} scored cases are not in {RECORD}.")
    if seen := [name for name in cases if name in run.training]:
        some = f"{len(seen)} of {len(cases)} scored cases"
        notes.append(f"{some} were trained on: these figures say nothing about new scans.")
    return notes


def read_curves(path: Path) -> tuple[dict[str, object], ...]:
    """The records of a metrics.jsonl; a line cut short by a kill is left out. () without a file."""
    records = []
    for line in _text(path).splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return tuple(records)


def _text(path: Path) -> str:
    if not path.is_file():
        return ""
    with read_problems(path):
        return path.read_text(encoding="utf-8", errors="replace")
