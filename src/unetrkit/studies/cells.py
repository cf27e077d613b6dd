"""A cell of a study: trained as any run is, then measured on every validation case."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from unetrkit.data.files import atomic_write, read_json, remove
from unetrkit.data.store import StoredCase
from unetrkit.errors import UserError
from unetrkit.inference.model import load_model
from unetrkit.inference.predict import PredictSettings
from unetrkit.studies.design import Cell
from unetrkit.training.learner import device_of
from unetrkit.training.log import say
from unetrkit.training.run import train
from unetrkit.training.validation import Validation

SCORES = "scores.json"
LAST_SHARE = 0.1  # of the steps, over which the training loss is averaged


@dataclass(frozen=True)
class Scores:
    """What a cell was worth: Dice by case and organ (None where undefined), and its loss at the end."""

    dice: dict[str, dict[str, float | None]]
    training_loss: float

    @property
    def organs(self) -> list[str]:
        return list(next(iter(self.dice.values()), {}))


def make(cell: Cell, cases: Sequence[StoredCase]) -> None:
    """Trains a cell, or goes on with it, and measures its model of the last step on `cases`.

    A run is validated once, after its last step, so that the model in its folder is that of the last step and
    not one chosen on the cases that are compared. Its checkpoints, ten times the size of the model, are
    removed when it is measured.
    """
    train(cell.settings)
    model = load_model(cell.folder, device_of(cell.settings.loop.device))
    how = PredictSettings(
        overlap=cell.settings.validation.overlap,
        window=model.window,
        device=cell.settings.loop.device,
    )
    say(f"measuring {len(cases)} cases")
    scores = {
        "step": model.description["origin"]["step"],
        "weights": model.description["sha256"],
        "sources": {case.name: case.source for case in cases},
        "training_loss": _training_loss(cell),
        "dice": Validation(model.plan, cases, how).each_case(model.network),
    }
    atomic_write(cell.folder / SCORES, json.dumps(scores, indent=1, ensure_ascii=False).encode())
    for name in ("last", "previous", "best"):
        remove(cell.folder / name)


def scores_of(cell: Cell, cases: Sequence[StoredCase]) -> Scores | None:
    """What was measured of a cell; None where it is not finished.

    Raises UserError where it was measured on other cases than the study's are now.
    """
    path = cell.folder / SCORES
    if not path.exists():
        return None
    found: Any = read_json(path)
    try:
        scores, sources = Scores(found["dice"], float(found["training_loss"])), found["sources"]
        complete = all(organs.keys() == set(scores.organs) for organs in scores.dice.values())
    except (KeyError, TypeError, ValueError, AttributeError):
        complete, sources = False, {}
    if not complete:
        raise UserError(
            f"`{path}` is not what a study wrote", hint="remove the cell's folder to make it again"
        )
    if sources != {case.name: case.source for case in cases}:
        hint = "name a new folder as `out`, or restore the store"
        raise UserError(f"`{path}` was measured on other cases than the store has now", hint=hint)
    return scores


def _training_loss(cell: Cell) -> float:
    """The mean loss over the last tenth of the steps; on augmented patches, as it was descended."""
    lines = Path(cell.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [record for line in lines if (record := json.loads(line))["event"] == "training"]
    late = [r["loss"] for r in records if r["step"] > (1 - LAST_SHARE) * cell.settings.loop.steps]
    return fmean(late)
