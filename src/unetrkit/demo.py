"""The demo: the commands that a user would type, one after another, on a generated data set."""

import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

from unetrkit.errors import UserError

# The published BTCV plan, coarser: what two CPU cores can learn in minutes.
PLAN = "--published btcv spacing=4,4,4 patch_size=48,48,48"


def run_demo(out: Path, run: Callable[[list[str]], object]) -> None:
    """Generate, check, prepare, train, predict and evaluate in `out`; `run` runs one command line.

    What an earlier demo left there is used again: an interrupted demo goes on, a finished one is quick.
    """
    from unetrkit.data.phantom import write_phantom
    from unetrkit.progress import progress

    begin = time.monotonic()
    if out.is_dir() and any(out.iterdir()) and not (out / "data").is_dir():
        raise UserError(f"`{out}` holds something that is not a demo", hint="name an empty or new folder")
    with progress("generating subjects") as report_progress:
        datalist = write_phantom(out / "data", progress=report_progress)
    folders = (datalist, out / "store", out / "run", out / "predictions", out / "report")
    data, store, trained, labels, report = (shlex.quote(str(path)) for path in folders)
    for command in (
        f"check {data}",
        f"prepare {data} {store} {PLAN}",
        f"train demo data={store} out={trained}",
        f"predict {data} {labels} --model {trained} --split validation --overwrite",
        f"evaluate {labels} {data} {report} --run {trained}",
    ):
        print(f"\n$ unetrkit {command}", file=sys.stderr)
        run(shlex.split(command))
    minutes = (time.monotonic() - begin) / 60
    print(f"\nthe demo took {minutes:.1f} minutes; its report is {out / 'report' / 'report.html'}")
