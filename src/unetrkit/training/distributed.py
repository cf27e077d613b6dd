"""Several processes that train as one: torchrun starts them, the mean of their gradients is descended."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from unetrkit.errors import UserError
from unetrkit.ranks import ALONE, local_rank, this_rank
from unetrkit.training.interruption import Stop

Part = TypeVar("Part")
# rank 0 may validate or write while others wait; a rank that hangs ends the job after so long
PATIENCE = timedelta(minutes=30)
# what gloo says, which has no exception of its own, where another rank has ended or does not answer
LOST = re.compile(r"gloo|Connection (closed|reset) by peer|Broken pipe|Timed out waiting", re.IGNORECASE)


@contextmanager
def together(device: torch.device) -> Iterator[None]:
    """The processes that torchrun started are one group inside; NCCL between GPUs, else gloo.

    Raises UserError where another rank ends, or does not answer for PATIENCE.
    """
    if this_rank().world == 1 or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(local_rank())
    backend = "nccl" if device.type == "cuda" else "gloo"
    store, rank, world = next(dist.rendezvous("env://", timeout=PATIENCE))
    # torchrun's store outlives a restart, and with it the addresses of the processes before (torch 2.13)
    store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=PATIENCE)
    try:
        with warnings.catch_warnings():  # each rank would say what no user can change
            # no block's output is changed in place, of which the third warns: a test compares each gradient
            warnings.filterwarnings("ignore", "`broadcast_buffers`|Grad strides do not match|FSDP2-wrapped")
            yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not LOST.search(str(error)):
            raise
        raise UserError(
            "another rank of this training has ended or does not answer",
            hint="what ended it is said above or below; the same command goes on from the last checkpoint",
        ) from error
    finally:
        dist.destroy_process_group()


def means(values: Tensor) -> Tensor:
    """Of (n,) numbers of each rank their means over ranks."""
    if dist.is_initialized():
        dist.all_reduce(values)
        values = values / dist.get_world_size()
    return values


def anywhere(*flags: bool, device: torch.device) -> Sequence[bool]:
    """Whether each is so on any rank: all ranks must do the same."""
    if not dist.is_initialized():
        return flags
    found = torch.tensor(flags, dtype=torch.float32, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.bool().tolist()


def from_all(work: Callable[[], Part]) -> list[Part]:
    """What `work` gives on each rank, in the order of ranks, on every rank; so no rank is ahead of it.

    A UserError or Stop of one rank is raised on all: none waits for what will not come.
    """
    if not dist.is_initialized():
        return [work()]
    outcome: Part | UserError | Stop
    try:
        outcome = work()
    except (UserError, Stop) as problem:
        outcome = problem
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, outcome)
    for one in outcomes:
        if isinstance(one, UserError | Stop):
            raise one
    return outcomes


def from_first(work: Callable[[], Part]) -> Part:
    """What `work` gives on rank 0, which does it alone, on every rank; or what it raises."""
    return from_all(lambda: work() if this_rank().first else None)[0]  # type: ignore[return-value]


def share(items: Sequence[Part]) -> list[Part]:
    """Those of the items that are this rank's, every n-th."""
    rank = this_rank() if dist.is_initialized() else ALONE
    return list(items[rank.rank :: rank.world])
