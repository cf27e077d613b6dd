"""Training by Ray Train: after the loss of a worker or a machine all begin again from the last checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from unetrkit.data.remote import url_of
from unetrkit.deployment.ray_tasks import connect
from unetrkit.deployment.training import KINDS, read
from unetrkit.errors import Interrupted, MissingExtra, UserError
from unetrkit.memory import keep_freed_memory


def trainer(words: Sequence[str], workers: int, *, gpu: bool, restarts: int) -> Any:
    """Ray's trainer whose workers are the ranks of `unetrkit WORDS`, a GPU for each; nothing is started.

    Their paths are those of the folder where this is called: all machines must see it. Ray's own records are
    `.ray` in the run's folder; in `runs` if that is a URL. Raises UserError as `read`, and without ray.
    """
    settings = read(words)
    records = Path(settings.out if settings.out and not url_of(settings.out) else "runs").absolute()
    try:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer
    except ImportError as error:
        raise MissingExtra("`unetrkit launch ray`", "ray") from error
    again = FailureConfig(max_failures=restarts)
    return TorchTrainer(
        partial(_rank, KINDS[words[0]][1], settings, Path.cwd()),
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpu),
        run_config=RunConfig(name=".ray", storage_path=str(records), failure_config=again),
    )


def run(prepared: Any, address: str | None = None) -> None:
    """Trains to the end on the cluster at `address` (see `connect`).

    Raises UserError for what a worker finds wrong, and without a cluster; Interrupted for Ctrl-C and SIGTERM.
    """
    ray = connect(address)
    try:
        prepared.fit()
    except SystemExit as stop:  # so Ray answers a signal
        raise Interrupted("stopped", hint="the same command goes on from the last checkpoint") from stop
    except ray.train.WorkerGroupError as error:
        for cause in error.worker_failures.values():
            if isinstance(cause, UserError):
                raise cause from error
        raise


def _rank(work: Callable[[Any], object], settings: Any, folder: Path) -> None:
    """What a worker does. Ray has made it a rank: RANK, WORLD_SIZE, the group of processes, its GPU."""
    os.chdir(folder)  # Ray has put it into a folder of its own
    keep_freed_memory()
    work(settings)
