"""The command `unetrkit fetch`."""

from pathlib import Path
from typing import Annotated

import typer

from unetrkit.cli.app import quoted, say


def fetch(
    name: Annotated[str | None, typer.Argument(help="A data set; without one they are listed.")] = None,
    out: Annotated[Path | None, typer.Argument(help="Its folder; by default its name.")] = None,
) -> None:
    """Download a public data set, verify, unpack or convert it, with the published splits as a data list.

    Run it again after an interruption: it goes on, and fetches only what is missing.

    Example: unetrkit fetch msd-spleen spleen
    """
    from unetrkit.fetch.catalogue import catalogue
    from unetrkit.fetch.run import fetch as fetch_dataset
    from unetrkit.progress import progress

    if name is None:
        print(catalogue())
        say("next: unetrkit fetch NAME FOLDER")
        return
    with progress(f"fetching {name}") as report_progress:
        datalist = fetch_dataset(name, out or Path(name), report_progress)
    say(f"next: unetrkit check {quoted(datalist)}")
