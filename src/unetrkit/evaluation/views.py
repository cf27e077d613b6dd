"""The worst cases, drawn: for each the organ that is worst, in three planes."""

from collections.abc import Sequence
from dataclasses import dataclass

from unetrkit.data.geometry import reorient, spacing_of, to_ras, turn
from unetrkit.data.plan import Plan
from unetrkit.data.prepare import read_case
from unetrkit.data.volume import read_label
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
    pair_of = {pair.name: pair for pair in pairs}
    return [_view(case, pair_of[case.name], plan) for case in summary.worst_first()[:WORST_CASES]]


def worst_organ(case: CaseMetrics) -> OrganMetrics:
    """The organ of lowest Dice; of several at the same, the one with most voxels in either mask."""
    counted = [organ for organ in case.organs if organ.dice is not None]
    return min(counted, key=lambda o: (o.dice, -o.truth_ml - o.prediction_ml))


def _view(case: CaseMetrics, pair: Pair, plan: Plan | None) -> View:
    image, label = read_case(pair.case)
    assert label is not None
    prediction = reorient(read_label(pair.prediction), image.affine).array
    organ = worst_organ(case)
    upright, axes, flips = to_ras(image)
    masks = turn(label[0], axes, flips) == organ.id, turn(prediction[0], axes, flips) == organ.id
    window = None
    if plan is not None and plan.intensity[0].kind == "window":  # percentiles say nothing about grey levels
        window = plan.intensity[0].lower, plan.intensity[0].upper
    pictures = figures.slices_figure(upright.array[0], *masks, spacing_of(upright.affine), window)
    return View(case, organ, pictures)
