"""A training that loses a worker, or its machine, before its third step; the first time only."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

from unetrkit.ranks import this_rank
from unetrkit.training import run
from unetrkit.training.run import TrainSettings


def losing(settings: TrainSettings) -> None:
    """`train`, amid which rank 1 writes its node's name and is killed, or waits for that: `.lost-HOW`."""
    import ray

    batches = run.batches
    [note] = settings.out.parent.glob("lose-*")

    def interrupted(*where: Any, **more: Any) -> Iterator[Any]:
        for number, one in enumerate(batches(*where, **more)):
            if number == 2 and this_rank().rank == 1 and not note.read_text():
                note.write_text(ray.get_runtime_context().get_node_id())
                if note.name == "lose-worker":
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(100)
            yield one

    run.batches = interrupted
    try:
        run.train(settings)
    finally:
        run.batches = batches
