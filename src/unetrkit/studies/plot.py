"""The picture of a study: Dice of every run, and the differences with their intervals."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING, Any

from unetrkit.evaluation.figures import ACCENT, FAINT, INK, new_figure
from unetrkit.studies.results import Line, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# told apart by people with any colour vision (Okabe and Ito)
COLOURS = (INK, ACCENT, "#e69f00", "#009e73", "#cc79a7", "#d55e00")


def draw(results: Results) -> bytes:
    """An SVG: against volumes where there are several, else a line for each row."""
    several = len(results.study.volumes) > 1
    height = 3.4 if several else 0.9 + 0.38 * len(results.study.rows)
    with new_figure(9.0, height) as figure:
        dice, differences = figure.subplots(1, 2, sharey=not several)
        for place, row in enumerate(results.study.rows):
            lines = [line for line in results.lines if line.row == row]
            colour = COLOURS[place % len(COLOURS)] if several else ACCENT
            for line in lines:
                _runs(dice, line, _place(results, line, place), several)
                _difference(differences, line, _place(results, line, place), colour, several)
            if several and lines:
                middle = [_place(results, line, place) for line in lines]
                dice.plot(middle, [line.dice for line in lines], color=colour, linewidth=1.4, label=row)
        reference = results.study.rows[0]
        (differences.axhline if several else differences.axvline)(0, color=INK, linewidth=0.8, zorder=1)
        titles = ("Dice, a point for each seed", f"Difference to {reference}, 95 % interval")
        for axes, title in zip((dice, differences), titles, strict=True):
            axes.set_title(title, loc="left", fontsize=10)
            axes.tick_params(length=0)
            axes.grid(axis="y" if several else "x", color=FAINT, linewidth=0.6)
            axes.set_axisbelow(True)
            if several:
                axes.set_xticks(range(len(results.study.volumes)), list(map(str, results.study.volumes)))
                axes.set_xlim(-0.5, len(results.study.volumes) - 0.5)
                axes.set_xlabel("training volumes")
            else:
                names = [row.replace("_", " ") for row in results.study.rows]
                axes.set_yticks(range(len(names)), names)
                axes.set_ylim(len(names) - 0.5, -0.5)
        if several:
            dice.legend(frameon=False, fontsize=8)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        return buffer.getvalue()


def _place(results: Results, line: Line, row: int) -> float:
    """Where a line stands: at its number of volumes, rows side by side; or in its row."""
    rows, volumes = len(results.study.rows), results.study.volumes
    if len(volumes) == 1:
        return row
    return volumes.index(line.volumes) + 0.36 * (row - (rows - 1) / 2) / rows


def _runs(axes: Axes, line: Line, place: float, upright: bool) -> None:
    values = list(line.runs.values())
    places = [place] * len(values)
    style: dict[str, Any] = {"markersize": 4, "alpha": 0.6, "mew": 0, "zorder": 3}
    axes.plot(*((places, values) if upright else (values, places)), "o", color=INK, **style)
    if not upright:
        axes.plot([line.dice] * 2, [place - 0.25, place + 0.25], color=ACCENT, linewidth=2, zorder=2)


def _difference(axes: Axes, line: Line, place: float, colour: str, upright: bool) -> None:
    if line.comparison is None or math.isnan((found := line.comparison.difference).mean):
        return
    mean, low, high = found.mean, found.low, found.high
    style: dict[str, Any] = {"fmt": "o", "color": colour, "markersize": 4.5, "elinewidth": 1.4, "capsize": 3}
    errors = None if math.isnan(low) else [[mean - low], [high - mean]]
    if upright:
        axes.errorbar([place], [mean], yerr=errors, **style)
    else:
        axes.errorbar([mean], [place], xerr=errors, **style)
