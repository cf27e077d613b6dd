"""Validation while training: what the report measures, on the original grid, cheap enough to repeat."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated

import numpy as np
from pydantic import Field
from torch import nn

from unetrkit.config import Settings
from unetrkit.data.geometry import reorient, same_grid
from unetrkit.data.plan import Plan
from unetrkit.data.store import StoredCase
from unetrkit.data.volume import read_label
from unetrkit.errors import UserError
from unetrkit.evaluation.metrics import dice_scores
from unetrkit.inference.predict import PredictSettings, predict_stored
from unetrkit.training.distributed import from_all, share

KEPT_LABELS = 512 * 2**20  # bytes of original labels that stay in memory between validations


class ValidationSettings(Settings):
    """How much of a validation; the report at the end measures everything."""

    # of neighbouring windows
    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.5
    # the first of the validation cases; null: all
    cases: Annotated[int, Field(ge=1)] | None = None


class Validation:
    """Mean Dice of a network over the organs, and Dice of each: {"dice": …, "dice/spleen": …}.

    An organ's Dice is its mean over the cases where it is defined (see `evaluation.metrics`), NaN where it is
    defined in none; "dice" is the mean over the organs that have one.

    Raises UserError: a case without a label.
    """

    def __init__(self, plan: Plan, cases: Sequence[StoredCase], settings: PredictSettings) -> None:
        for case in cases:
            _label(case)
        self._plan = plan
        self._cases = cases
        self._settings = settings
        self._kept: dict[str, np.ndarray] = {}

    def __call__(
        self, network: nn.Module, show: Callable[[str], None] = lambda line: None
    ) -> dict[str, float]:
        """`show` is told how far it is."""
        scores = self.each_case(network, show).values()
        organs = [c.name for c in self._plan.classes if c.id != 0]
        found = {organ: [dice for case in scores if (dice := case[organ]) is not None] for organ in organs}
        means = {organ: fmean(values) if values else math.nan for organ, values in found.items()}
        defined = [mean for mean in means.values() if not math.isnan(mean)]
        named = {f"dice/{organ}": mean for organ, mean in means.items()}
        return {"dice": fmean(defined) if defined else math.nan} | named

    def each_case(
        self, network: nn.Module, show: Callable[[str], None] = lambda line: None
    ) -> dict[str, dict[str, float | None]]:
        """Dice by case and organ; None where it is not defined. Ranks share the work."""
        organs = {c.id: c.name for c in self._plan.classes if c.id != 0}
        mine = share(self._cases)

        def measured() -> dict[str, dict[str, float | None]]:
            scores = {}
            for number, case in enumerate(mine, 1):
                show(f"validating {number}/{len(mine)}")
                image = case.whole_image()
                prediction = predict_stored(network, image, case.grid, self._plan, self._settings)
                dice = dice_scores(self._truth(case), prediction, list(organs))
                scores[case.name] = {organs[organ]: value for organ, value in dice.items()}
            return scores

        of_all = {name: dice for part in from_all(measured) for name, dice in part.items()}
        return {case.name: of_all[case.name] for case in self._cases}

    def _truth(self, case: StoredCase) -> np.ndarray:
        """The case's own label, (x, y, z) ids, in the axis order of its image."""
        if case.name not in self._kept:
            kept = "truth" in case.record.layouts
            truth = case.arrays["truth"].whole()[0] if kept else self._read(case)
            if truth.nbytes + sum(kept.nbytes for kept in self._kept.values()) > KEPT_LABELS:
                return truth
            self._kept[case.name] = truth
        return self._kept[case.name]

    def _read(self, case: StoredCase) -> np.ndarray:
        """From the label's file: the store is of before it kept them."""
        affine = np.asarray(case.grid.affine)
        label = reorient(read_label(_label(case)), affine)
        truth = label.array[0]
        if difference := same_grid(affine, case.grid.shape, label.affine, truth.shape):
            raise UserError(
                f"`{case.label_file}` is not on the grid that case `{case.name}` was prepared on: "
                f"{difference}",
                hint="run `unetrkit prepare` again: the file was changed since",
            )
        return truth


def _label(case: StoredCase) -> Path:
    if case.label_file is None:
        message = f"case `{case.name}` has no label to validate against"
        hint = "give it one in the data list, and run `unetrkit prepare` again"
        raise UserError(message, hint=hint)
    return case.label_file
