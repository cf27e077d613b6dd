"""A whole study: the cells that are not finished are made, then the tables from what is there."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence

from unetrkit.config import to_yaml
from unetrkit.data.files import atomic_write, write_problems
from unetrkit.errors import UserError, nearest
from unetrkit.ranks import this_rank
from unetrkit.studies.cells import Scores, make, scores_of
from unetrkit.studies.design import Cell, Study, StudySettings, design, written
from unetrkit.studies.results import results
from unetrkit.studies.tables import write_tables
from unetrkit.training.log import duration, say


def open_study(name: str, settings: StudySettings) -> Study:
    """The study in its folder, begun or gone on with; each of its cells has its config.yaml.

    Many may open it at once: whoever finds the folder finds the recipe, and all write the same.
    Raises UserError where the folder holds something else, or cells with other settings.
    """
    if this_rank().world > 1:
        hint = "`unetrkit study … --list` prints the command of each run, and torchrun may start those"
        raise UserError("a study makes its runs in one process, not under torchrun", hint=hint)
    study = design(name, settings)
    recipe, out = study.out / f"{name}.yaml", study.out
    if out.exists() and not recipe.exists():
        if not out.is_dir() or any(not file.name.startswith(".") for file in out.iterdir()):
            hint = "name a new folder as `out`"
            raise UserError(f"`{out}` holds something that is not a study of {name}", hint=hint)
    new = [cell for cell in study.cells if not written(cell)]
    with write_problems(out):
        out.mkdir(parents=True, exist_ok=True)
    atomic_write(recipe, to_yaml(settings).encode())
    for cell in new:
        with write_problems(out):
            cell.folder.mkdir(parents=True, exist_ok=True)
        atomic_write(cell.folder / "config.yaml", to_yaml(cell.settings).encode())
    return study


def run_study(study: Study, only: str | None = None) -> str:
    """Makes the cells that are not finished, or `only` one of them; returns the table of what is there.

    Writes table.md, table.csv, cells.csv and plot.svg. Raises UserError for a cell that cannot be made, and
    Interrupted for Ctrl-C or SIGTERM; the same call goes on.
    """
    names = [cell.name for cell in study.cells]
    if only is not None and only not in names:
        raise UserError(f"the study has no cell `{only}`", hint=nearest(only, names))
    make_cells(study, [cell for cell in study.cells if only in (None, cell.name)])
    found = _scores(study)
    return write_tables(results(study, found), found)


def make_cells(study: Study, cells: Sequence[Cell]) -> None:
    """Makes those of the cells that are not finished; writes no table, as others may be at work on theirs."""
    unmade = unfinished(study)
    todo = [cell for cell in cells if cell in unmade]
    say(f"{len(study.cells)} cells, {len(unmade)} not finished, in {study.out}")
    began = time.monotonic()
    for number, cell in enumerate(todo):
        spent = time.monotonic() - began
        left = f", about {duration(spent / number * (len(todo) - number))} left" if number else ""
        say(f"cell {number + 1} of {len(todo)}: {cell.name}{left}")
        make(cell, study.validation)


def unfinished(study: Study) -> list[Cell]:
    """The cells that are not finished."""
    return [cell for cell in study.cells if scores_of(cell, study.validation) is None]


def commands(study: Study) -> list[str]:
    """The command that trains each cell, here or on any machine that sees the same paths."""
    return [f"unetrkit train {shlex.quote(str(cell.folder / 'config.yaml'))}" for cell in study.cells]


def _scores(study: Study) -> dict[str, Scores]:
    found = {cell.name: scores_of(cell, study.validation) for cell in study.cells}
    return {name: scores for name, scores in found.items() if scores is not None}
