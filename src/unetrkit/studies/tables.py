"""A study's results as files: table.md and table.csv, cells.csv, and a picture."""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence

from unetrkit.data.files import atomic_write
from unetrkit.errors import many
from unetrkit.studies.cells import Scores
from unetrkit.studies.plot import draw
from unetrkit.studies.results import Comparison, Line, Results
from unetrkit.studies.statistics import Difference

Rows = list[list[str]]


def write_tables(results: Results, scores: Mapping[str, Scores]) -> str:
    """Writes the files into the study's folder; what table.md holds above its details is returned."""
    study = results.study
    head, *body = _efficiency(results) if study.name == "label_efficiency" else _ablation(results)
    main = "\n".join([_markdown([head, *body]), "", *(f"- {one}" for one in results.verdicts())])
    if results.missing:
        main += f"\n\nNot finished yet: {', '.join(f'`{name}`' for name in results.missing)}."
    title = study.name.replace("_", " ").capitalize()
    parts = [f"# {title}", main, "![Dice and differences](plot.svg)"]
    if len(results.organs) > 1 and results.comparisons:
        parts += ["## By organ", _markdown(_organs(results))]
    parts += ["## How to read this", "\n".join(f"- {note}" for note in _notes(results))]
    atomic_write(study.out / "table.md", ("\n\n".join(parts) + "\n").encode())
    atomic_write(study.out / "table.csv", _csv(_long(results)))
    atomic_write(study.out / "cells.csv", _csv(_cells(results, scores)))
    atomic_write(study.out / "plot.svg", draw(results))
    return main


def _efficiency(results: Results) -> Rows:
    """The table of the originals, and the interval they do not have."""
    head = "training volumes, validation volumes, initialisation, random, pre-trained, relative improvement"
    rows = [[*head.split(", "), "difference [95 %]", "seeds"]]
    for line, one in _compared(results):
        volumes = [str(line.volumes), str(len(results.study.validation)), line.row]
        dice = [_number(one.reference), _number(one.dice), _percent(one.improvement)]
        rows.append([*volumes, *dice, _interval(one.difference), str(one.seeds)])
    return rows


def _ablation(results: Results) -> Rows:
    reference = results.study.rows[0]
    head = (
        f"{results.study.name}, training volumes, validation volumes, training loss, Dice without background"
    )
    rows = [[*head.split(", "), f"difference to {reference} [95 %]", "seeds"]]
    for line in results.lines:
        volumes = [line.row, str(line.volumes), str(len(results.study.validation))]
        found = "" if line.comparison is None else _interval(line.comparison.difference)
        rows.append([*volumes, _number(line.training_loss), _number(line.dice), found, str(len(line.runs))])
    return rows


def _organs(results: Results) -> Rows:
    share = f"{100 * (1 - 0.05 / len(results.organs)):.1f}".removesuffix(".0")
    rows = [["training volumes", "row", "organ", results.study.rows[0], "Dice", f"difference [{share} %]"]]
    for line, one in _compared(results):
        for organ, (reference, dice, difference) in one.organs.items():
            numbers = [_number(reference), _number(dice), _interval(difference)]
            rows.append([str(line.volumes), line.row, organ, *numbers])
    return rows


def _long(results: Results) -> Rows:
    """A line per row, number of volumes and organ, the mean over organs first."""
    head = "row,training_volumes,validation_volumes,seeds,training_loss,organ,reference,dice"
    rows = [[*head.split(","), "relative_improvement", "difference", "low", "high", "verdict"]]
    for line in results.lines:
        start = [line.row, str(line.volumes), str(len(results.study.validation)), str(len(line.runs))]
        start.append(_exact(line.training_loss))
        if (one := line.comparison) is None:
            rows.append([*start, "mean", "", _exact(line.dice), "", "", "", "", ""])
            continue
        found = {"mean": (one.reference, one.dice, one.difference), **one.organs}
        for organ, (reference, dice, difference) in found.items():
            words = one.verdict(results.comparisons) if organ == "mean" else difference.words()
            numbers = [reference, dice, difference.mean / reference if reference > 0 else math.nan]
            numbers += [difference.mean, difference.low, difference.high]
            rows.append([*start, organ, *map(_exact, numbers), words])
    return rows


def _cells(results: Results, scores: Mapping[str, Scores]) -> Rows:
    rows = [["cell", "row", "training_volumes", "seed", "training_loss", "case", *results.organs]]
    for cell in results.study.cells:
        if found := scores.get(cell.name):
            start = [cell.name, cell.row, str(cell.volumes), str(cell.seed), _exact(found.training_loss)]
            for case, dice in found.dice.items():
                rows.append([*start, case, *(_exact(dice[organ]) for organ in results.organs)])
    return rows


def _notes(results: Results) -> list[str]:
    study = results.study
    subjects = len({case.subject for case in study.validation})
    seeds = max(len(line.runs) for line in results.lines)
    notes = [
        "Dice is that of the model of the last step, in every row: none was chosen on the validation cases. "
        "It is measured on the original grid, without the background; the mean is that over organs of their "
        "means.",
        f"Differences are paired by case and seed ({many(subjects, 'subject')}, {many(seeds, 'seed')}), "
        "where both Dice are defined. Intervals resample subjects and seeds, and are widened for their small "
        "number.",
        "An interval that holds zero does not show that there is no difference, but how large it may be.",
    ]
    if seeds == 1:
        notes.append("With one seed the intervals do not say how much another seed would have changed.")
    if (count := results.comparisons) > 1:
        notes.append(
            f"Each interval stands alone. Were there no difference at all, {count} comparisons would call "
            f"one or more in up to {100 * (1 - 0.95**count):.0f} of 100 studies; the verdicts say "
            "what is left when that is allowed for (Bonferroni)."
        )
    if len(results.organs) > 1:
        notes.append("The intervals of organs are wider: together, not each, they hold 95 %.")
    if study.name == "augmentation":
        notes.append(
            "Training loss is that of augmented patches: a row that augments more has the harder ones."
        )
    return notes


def _compared(results: Results) -> Iterable[tuple[Line, Comparison]]:
    return ((line, line.comparison) for line in results.lines if line.comparison is not None)


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns stand under each other in a terminal, too."""
    clean = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*clean, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in clean]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def _csv(rows: Rows) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"


def _exact(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.6f}"


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{100 * value:+.1f} %"


def _interval(difference: Difference) -> str:
    if math.isnan(difference.low):
        return "–" if math.isnan(difference.mean) else f"{difference.mean:+.3f}"
    return f"{difference.mean:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]"
