"""The tiny network under torchrun, with a rank that is killed or hangs: `ending.py FOLDER WHAT`."""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

from tests.training.several import cubes

from unetrkit.cli import report_error
from unetrkit.errors import ExitCode, Interrupted, UserError
from unetrkit.ranks import this_rank
from unetrkit.training import distributed
from unetrkit.training.loop import LoopSettings

SETTINGS = LoopSettings(
    steps=12, validate_every=4, save_every=2, log_every=1, workers=0, device="cpu", amp="off"
)


def main(folder: Path, what: str) -> None:
    def before(step: int) -> None:
        first_try = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if step == 7 and this_rank().rank == 1 and first_try:
            if what == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if what == "hangs":
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                time.sleep(1000)
        if what == "slow":  # to be stopped from outside
            (folder / f"at-{this_rank().rank}").touch()
            time.sleep(0.2)

    if what == "hangs":
        distributed.PATIENCE = timedelta(seconds=10)
    try:
        cubes(folder, SETTINGS.model_copy(update={"steps": 1000}) if what == "slow" else SETTINGS, before)
    except UserError as error:
        report_error(error.message, error.hint, ExitCode.WRONG_USE)
    except Interrupted as stop:
        report_error(stop.message, stop.hint, ExitCode.INTERRUPTED)


if __name__ == "__main__":  # nothing happens where it is only collected
    main(Path(sys.argv[1]), sys.argv[2])
