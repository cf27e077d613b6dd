"""Which of several processes this is, as torchrun says it; by itself a process is rank 0 of 1."""

import hashlib
import os
import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Rank:
    """Which process of a training this is, and of how many."""

    rank: int
    world: int

    @property
    def first(self) -> bool:
        """The one that writes files and speaks."""
        return self.rank == 0


ALONE = Rank(0, 1)
PATIENCE = 2.0  # seconds for which a message waits for the other ranks to find the same


def this_rank() -> Rank:
    """From the variables of torchrun, whose meaning every launcher of torch keeps to."""
    return Rank(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


def local_rank() -> int:
    """Which of this machine's processes, and so of its GPUs."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def first_to_say(text: str) -> bool:
    """Whether no other rank of this job has said the same: what all ranks find wrong is said once."""
    if this_rank().world == 1:
        return True
    from datetime import timedelta

    from torch.distributed import TCPStore

    key = "unetrkit/" + hashlib.sha256(text.encode()).hexdigest()
    try:
        where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(*where, is_master=False, timeout=timedelta(seconds=10))
        first = bool(store.add(key, 1) == 1)
        # where this process holds the store, and not torchrun, it ends with it: the others ask before
        if this_rank().first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            until = time.monotonic() + PATIENCE
            while store.add(key, 0) < this_rank().world and time.monotonic() < until:
                time.sleep(0.02)
        return first
    except (KeyError, ValueError, RuntimeError):  # no store any more: better twice than never
        return True
