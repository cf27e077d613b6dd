"""The command `unetrkit study`."""

from __future__ import annotations

from typing import Annotated

import typer

from unetrkit.memory import keep_freed_memory


def study(
    name: Annotated[str, typer.Argument(help="label_efficiency, augmentation or architecture.")],
    override: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="data=, out=, init=, volumes=, seeds=, any of `train`'s"),
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="Begin with this recipe of `train`.")] = None,
    cell: Annotated[str | None, typer.Option(help="Make only this cell.")] = None,
    part: Annotated[
        str | None, typer.Option(help="For arrays of jobs: 1/16 to 16/16 at once, then `table`.")
    ] = None,
    list_cells: Annotated[
        bool, typer.Option("--list", help="Print each cell's command; train none.")
    ] = False,
) -> None:
    """Answer a question by many runs: does pre-training help, which augmentation, which network?

    The same command again goes on where it was stopped. Each cell is a run folder in OUT/cells.

    Example: unetrkit study label_efficiency data=store init=pretrained volumes=3,6,12 seeds=3 out=study
    """
    from unetrkit.data.parts import Part
    from unetrkit.studies.design import read_settings
    from unetrkit.studies.run import commands, make_cells, open_study, run_study, unfinished
    from unetrkit.training.log import say

    keep_freed_memory()
    share = Part.read(part) if part not in (None, "table") else None
    opened = open_study(name, read_settings(name, override or [], recipe))
    if list_cells:
        print("\n".join(commands(opened)))
        say("next: run these anywhere that sees these paths, then the same `unetrkit study` without --list")
        return
    if share:
        make_cells(opened, share.of(opened.cells))
        say(f"part {part} is made; when all are: --part table")
        return
    print(run_study(opened, cell))
    if left := len(unfinished(opened)):
        say(f"next: {left} of {len(opened.cells)} cells are not finished; the same command makes them")
    else:
        say(f"next: read {opened.out / 'table.md'}; more `seeds` or `volumes` in the same `out` add cells")
