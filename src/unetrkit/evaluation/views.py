"""The worst cases, drawn: for each the organ that is worst, in three planes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from unetrkit.data.geometry import reorient, same_grid, spacing_of, to_ras
from unetrkit.data.plan import Plan
from unetrkit.data.volume import read_image, read_label
from unetrkit.errors import UserError
from unetrkit.evaluation import figures
from unetrkit.evaluation.metrics import OrganMetrics
from unetrkit.evaluation.pairs import Pair
from unetrkit.evaluation.summary import CaseMetrics, Summary

WORST_CASES = 5


@dataclass(frozen=True)
class View:
    """One case's pictures (data URIs) and what they show."""

    case: CaseMetrics
    organ: OrganMetrics
    pictures: list[str]


def worst_views(pairs: Sequence[Pair], summary: Summary, plan: Plan | None) -> list[View]:
    """The cases of lowest mean Dice, worst first.

    Raises UserError where an image cannot be read or is not on its label's grid.
    """
    pair_of = {pair.case.name: pair for pair in pairs}
    scored = sorted((c for c in summary.cases if c.dice is not None), key=lambda case: case.dice or 0.0)
    return [_view(case, pair_of[case.name], plan) for case in scored[:WORST_CASES]]


def worst_organ(case: CaseMetrics) -> OrganMetrics:
    """The organ of lowest Dice; of several at the same, the one with most voxels in either mask."""
    counted = [organ for organ in case.organs if organ.dice is not None]
    return min(counted, key=lambda o: (o.dice, -o.truth_ml - o.prediction_ml))


def _view(case: CaseMetrics, pair: Pair, plan: Plan | None) -> View:
    image = read_image(pair.case.images)
    label, prediction = (reorient(read_label(path), image.affine) for path in (pair.label, pair.prediction))
    shape = image.array.shape[1:]
    if difference := same_grid(image.affine, shape, label.affine, label.array.shape[1:]):
        raise UserError(
            f"`{pair.label}` is not on the grid of `{pair.case.images[0]}`: {difference}",
            hint="`unetrkit check` finds every such case",
        )
    organ = worst_organ(case)
    upright, there, found = (to_ras(volume)[0] for volume in (image, label, prediction))
    masks = there.array[0] == organ.id, found.array[0] == organ.id
    window = None
    if plan is not None and plan.intensity[0].kind == "window":  # percentiles say nothing about grey levels
        window = plan.intensity[0].lower, plan.intensity[0].upper
    pictures = figures.slices_figure(upright.array[0], *masks, spacing_of(upright.affine), window)
    return View(case, organ, pictures)
