"""Several processes that train as one: torchrun starts them, the mean of their gradients is descended."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from unetrkit.ranks import local_rank, this_rank

Part = TypeVar("Part")
# rank 0 may validate or write while others wait; a rank that hangs ends the job after so long
PATIENCE = timedelta(minutes=30)


@contextmanager
def together(device: torch.device) -> Iterator[None]:
    """The processes that torchrun started are one group inside; NCCL between GPUs, else gloo."""
    if this_rank().world == 1 or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(local_rank())
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def wait() -> None:
    """Until every rank is here."""
    if dist.is_initialized():
        dist.barrier()


def means(values: Tensor) -> Tensor:
    """Of (n,) numbers of each rank their means over ranks."""
    if dist.is_initialized():
        dist.all_reduce(values)
        values = values / dist.get_world_size()
    return values


def anywhere(flag: bool, device: torch.device) -> bool:
    """Whether it is so on any rank: all ranks must do the same."""
    if not dist.is_initialized():
        return flag
    found = torch.tensor(float(flag), device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found)


def from_all(part: Part) -> list[Part]:
    """What each rank has, in the order of ranks, on every rank."""
    if not dist.is_initialized():
        return [part]
    parts: list[Part | None] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, part)
    return [one for one in parts if one is not None]


def share(items: Sequence[Part]) -> list[Part]:
    """Those of the items that are this rank's, every n-th."""
    rank = this_rank() if dist.is_initialized() else None
    return list(items) if rank is None else list(items[rank.rank :: rank.world])
