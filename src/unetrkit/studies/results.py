"""What the finished cells of a study say: a line for each row and number of volumes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from unetrkit.errors import UserError, many
from unetrkit.evaluation.bootstrap import LEVEL
from unetrkit.studies.cells import Scores
from unetrkit.studies.design import Cell, Study
from unetrkit.studies.statistics import Difference, mean_difference, paired_means


@dataclass(frozen=True)
class Comparison:
    """One row against the reference, on the seeds, cases and organs that both have.

    `strict` is the difference with an interval that allows for all comparisons of the table, and those of
    `organs` allow for all organs (Bonferroni).
    """

    reference: float
    dice: float
    seeds: int
    difference: Difference
    strict: Difference
    organs: dict[str, tuple[float, float, Difference]]  # reference, row, difference

    @property
    def improvement(self) -> float:
        """Relative, as the originals state it: a share of the reference's Dice."""
        return self.difference.mean / self.reference if self.reference > 0 else np.nan

    def verdict(self, comparisons: int) -> str:
        """In words: the mean over organs first, then the organs that differ."""
        words = self.difference.words()
        if self.difference.told and comparisons > 1 and not self.strict.told:
            words += f", though not once {comparisons} comparisons are allowed for"
        told = {name: difference for name, (*_, difference) in self.organs.items() if difference.told}
        if len(self.organs) > 1 and not np.isnan(self.difference.low):
            organs = ", ".join(f"{name} {difference.mean:+.3f}" for name, difference in told.items())
            words += f"; organs that differ, {len(self.organs)} allowed for: {organs or 'none'}"
        return words


@dataclass(frozen=True)
class Line:
    """A row at one number of training volumes; `comparison` is None for the reference itself."""

    row: str
    volumes: int
    runs: dict[int, float]  # mean Dice of each seed
    training_loss: float
    comparison: Comparison | None

    @property
    def dice(self) -> float:
        return float(np.mean(list(self.runs.values())))


@dataclass(frozen=True)
class Results:
    """`comparisons` is how many the table makes; `missing` are the cells that are not finished."""

    study: Study
    organs: tuple[str, ...]
    lines: tuple[Line, ...]
    missing: tuple[str, ...]

    @property
    def comparisons(self) -> int:
        return sum(line.comparison is not None for line in self.lines)

    def verdicts(self) -> list[str]:
        """A sentence for each comparison."""
        reference = self.study.rows[0]
        return [
            f"{line.row} against {reference}, {many(line.volumes, 'training volume')}: "
            + line.comparison.verdict(self.comparisons)
            for line in self.lines
            if line.comparison is not None
        ]


def results(study: Study, scores: Mapping[str, Scores]) -> Results:
    """Compares every row with the first one, from the scores of the finished cells by their names.

    Raises UserError for scores of other organs.
    """
    if not scores:
        raise UserError("no cell of the study is finished", hint="run the study, or some of its cells, first")
    organs = next(iter(scores.values())).organs
    if any(one.organs != organs for one in scores.values()):
        raise UserError(
            f"the cells in `{study.out}` were measured on different organs", hint="name a new folder as `out`"
        )
    done = [cell for cell in study.cells if cell.name in scores]
    arms: dict[tuple[int, str], dict[int, Cell]] = {}
    for cell in done:
        arms.setdefault((cell.volumes, cell.row), {})[cell.seed] = cell
    tables = {cell.name: _table(study, organs, scores[cell.name]) for cell in done}
    reference = study.rows[0]
    pairs = [
        (volumes, row)
        for volumes, row in arms
        if row != reference and arms[volumes, row].keys() & arms.get((volumes, reference), {}).keys()
    ]
    lines = []
    for volumes, row in (place for place in product(study.volumes, study.rows) if place in arms):
        comparison, cells = None, arms[volumes, row]
        if (volumes, row) in pairs:
            comparison = _compare(study, organs, tables, (arms[volumes, reference], cells), len(pairs))
        runs = {seed: _mean(tables[cell.name]) for seed, cell in cells.items()}
        loss = float(np.mean([scores[cell.name].training_loss for cell in cells.values()]))
        lines.append(Line(row, volumes, runs, loss, comparison))
    missing = tuple(cell.name for cell in study.cells if cell.name not in scores)
    return Results(study, tuple(organs), tuple(lines), missing)


def _table(study: Study, organs: Sequence[str], scores: Scores) -> np.ndarray:
    """Dice (cases, organs), NaN where undefined."""
    rows = [[scores.dice[case.name][organ] for organ in organs] for case in study.validation]
    return np.array(rows, dtype=float)


def _mean(table: np.ndarray) -> float:
    return paired_means(table[None], table[None])[0]


def _compare(
    study: Study,
    organs: Sequence[str],
    tables: Mapping[str, np.ndarray],
    arms: tuple[Mapping[int, Cell], Mapping[int, Cell]],
    comparisons: int,
) -> Comparison:
    seeds = sorted(arms[0].keys() & arms[1].keys())
    first, second = (np.stack([tables[arm[seed].name] for seed in seeds]) for arm in arms)
    subjects = [case.subject for case in study.validation]
    difference = second - first  # seeds cases organs
    by_organ = {}
    for k, organ in enumerate(organs):
        level = 1 - (1 - LEVEL) / len(organs)
        of_organ = mean_difference(difference[..., k : k + 1], subjects, level=level)
        by_organ[organ] = (*paired_means(first[..., k : k + 1], second[..., k : k + 1]), of_organ)
    reference, dice = paired_means(first, second)
    return Comparison(
        reference,
        dice,
        len(seeds),
        mean_difference(difference, subjects),
        mean_difference(difference, subjects, level=1 - (1 - LEVEL) / comparisons),
        by_organ,
    )
