"""report.html of a pre-training run: curves, figures of the features, pictures, settings."""

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unetrkit.data.files import read_json
from unetrkit.evaluation import figures
from unetrkit.evaluation.report import write_html

Point = tuple[int, float]
TEMPLATE = Path(__file__).with_name("report.html.j2")
FIGURES = {
    "probe_dice": "Dice of the linear probe",
    "effective_rank": "Effective rank",
    "spread": "Spread of the features",
    "alignment": "Alignment of two views",
    "uniformity": "Uniformity",
}
PICTURES = 3  # of all those of a run: the first, one in the middle, the last


def write_report(out: Path, before: Mapping[str, float]) -> Path:
    """Writes the report of the run in `out` and returns its path; all pictures are inside.

    before: the figures of the untrained features.
    """
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    validated = [record for record in records if record["event"] == "validation"]
    path = out / "report.html"
    write_html(
        path,
        TEMPLATE,
        run=out.name,
        description=read_json(out / "model" / "model.json"),
        first=validated[0],
        before=before,
        last=validated[-1],
        best=min(validated, key=lambda one: float("inf") if one["loss"] is None else one["loss"]),
        curves=figures.panels_figure(_panels(records)),
        pictures=[_inside(picture) for picture in _some(sorted((out / "pictures").glob("step-*.png")))],
        config=(out / "config.yaml").read_text(encoding="utf-8"),
    )
    return path


def _panels(records: list[dict[str, Any]]) -> list[tuple[str, dict[str, list[Point]]]]:
    """(title, name -> points): what belongs on one scale in one panel."""
    parts: dict[str, dict[str, list[Point]]] = {"training": {}, "validation": {}}
    for record in records:
        for name, value in record.items():
            if name not in ("step", "event") and isinstance(value, int | float):
                parts[record["event"]].setdefault(name, []).append((record["step"], float(value)))
    training, validation = parts["training"], parts["validation"]
    shared = [name for name in training if name in validation]
    panels = [(name.capitalize(), {event: parts[event][name] for event in parts}) for name in shared]
    alone = [(title, name) for name, title in FIGURES.items() if name in validation]
    return panels + [(title, {title: validation[name]}) for title, name in alone]


def _some(paths: list[Path]) -> list[Path]:
    return paths if len(paths) <= PICTURES else [paths[0], paths[len(paths) // 2], paths[-1]]


def _inside(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
