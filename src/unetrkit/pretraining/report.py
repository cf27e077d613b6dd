"""report.html of a pre-training run: curves, figures of the features, pictures, settings."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unetrkit.data.files import atomic_write, read_json
from unetrkit.evaluation import figures
from unetrkit.evaluation.report import STYLE

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
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    validated = [record for record in records if record["event"] == "validation"]
    path = out / "report.html"
    html = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        style=STYLE.read_text(encoding="utf-8"),
        run=out.name,
        description=read_json(out / "model" / "model.json"),
        first=validated[0],
        before=before,
        last=validated[-1],
        best=min(validated, key=lambda record: _loss(record)),
        curves=figures.panels_figure(_panels(records)),
        pictures=[_inside(picture) for picture in _some(sorted((out / "pictures").glob("step-*.png")))],
        config=(out / "config.yaml").read_text(encoding="utf-8"),
    )
    atomic_write(path, html.encode())
    return path


def _loss(record: dict[str, Any]) -> float:
    return float("inf") if record["loss"] is None else record["loss"]


def _panels(records: list[dict[str, Any]]) -> list[tuple[str, dict[str, list[Point]]]]:
    """(title, name -> points): what belongs on one scale in one panel."""
    parts: dict[str, dict[str, list[Point]]] = {"training": {}, "validation": {}}
    for record in records:
        for name, value in record.items():
            if name not in ("step", "event") and isinstance(value, int | float):
                parts[record["event"]].setdefault(name, []).append((record["step"], float(value)))
    training, validation = parts["training"], parts["validation"]
    shared = [name for name in training if name in validation]
    panels = [
        (name.capitalize(), {event: parts[event][name] for event in ("training", "validation")})
        for name in shared
    ]
    return panels + [
        (title, {title: validation[name]}) for name, title in FIGURES.items() if name in validation
    ]


def _some(paths: list[Path]) -> list[Path]:
    if len(paths) <= PICTURES:
        return paths
    return [paths[0], paths[len(paths) // 2], paths[-1]]


def _inside(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
