"""The demo: the commands that a user would type, run one after another on a generated data set."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

from unetrkit.data.files import read_json
from unetrkit.errors import UserError

# What the demo trains is small enough for two CPU cores; the recipe says why each number.
RECIPE = "demo"


def run_demo(out: Path, run: Callable[[list[str]], object]) -> None:
    """Generate, check, prepare, train, predict, evaluate into `out`; `run` runs one command line.

    What an earlier demo left there is used again where it is still good (store, run); label maps are made anew.
    """
    from unetrkit.data.phantom import write_phantom
    from unetrkit.progress import progress

    begin = time.monotonic()
    if out.is_dir() and any(out.iterdir()) and not (out / "data").is_dir():
        raise UserError(f"`{out}` holds something that is not a demo", hint="name an empty or new folder")
    with progress("generating subjects") as report:
        datalist = write_phantom(out / "data", progress=report)
    store, trained, predictions, report_folder = (out / part for part in ("store", "run", "predictions", "report"))
    commands = (
        f"check {_quoted(datalist)}",
        f"prepare {_quoted(datalist)} {_quoted(store)} --plan {_quoted(_demo_plan())}",
        f"train {RECIPE} data={_quoted(store)} out={_quoted(trained)}",
        f"predict {_quoted(datalist)} {_quoted(predictions)} --model {_quoted(trained)} --split validation --overwrite",
        f"evaluate {_quoted(predictions)} {_quoted(datalist)} {_quoted(report_folder)} --run {_quoted(trained)}",
    )
    for command in commands:
        print(f"\n$ unetrkit {command}", file=sys.stderr)
        run(shlex.split(command))
    summary = read_json(report_folder / "metrics.json")
    print(f"\ndemo done in {(time.monotonic() - begin) / 60:.1f} minutes", file=sys.stderr)
    print(f"the report is {report_folder / 'report.html'}")
    del summary


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _demo_plan() -> Path:
    return Path(__file__).parent / "recipes" / "plans" / "demo.json"
