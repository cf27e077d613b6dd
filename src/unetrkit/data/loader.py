"""Training batches as a function of (seed, step): the same for any number of processes, from any step on."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from unetrkit.data.augment import (
    AugmentSettings,
    apply_intensity,
    apply_label,
    apply_spatial,
    draw_augmentation,
    mirrored_classes,
)
from unetrkit.data.plan import Plan
from unetrkit.data.sampling import SamplingSettings, case_at, draw_corner, generator_for, read_patch
from unetrkit.data.store import Store, StoredCase
from unetrkit.errors import UserError, nearest

Batch = dict[str, Tensor]


def batches(
    store: Path,
    cases: Sequence[str],
    sampling: SamplingSettings,
    augment: AugmentSettings,
    *,
    seed: int,
    start: int,
    stop: int,
    rank: int = 0,
    world: int = 1,
    workers: int,
) -> Iterator[Batch]:
    """Yield the batches of steps `start` to `stop` - 1, in order.

    A batch is {"image": float32 (b, c, x, y, z), "label": uint8 class indices (b, x, y, z)}. Patch i of rank
    r is patch r·b + i of the step: two ranks with batch size 1 see what one rank with batch size 2 sees.

    Raises UserError: no cases, a name that the store does not hold, a damaged chunk (also from a worker).
    """
    steps = _Steps(store, tuple(cases), sampling, augment, seed, rank, world)
    _ = steps.opened  # what the user got wrong is said here, before any process starts
    return _in_order(steps, start, stop, workers)


@dataclass(frozen=True)
class _Steps(Dataset[Batch | UserError]):
    """The batch of every step. Nothing of the store stays open, so that it may be forked or pickled."""

    store: Path
    cases: tuple[str, ...]
    sampling: SamplingSettings
    augment: AugmentSettings
    seed: int
    rank: int
    world: int

    @cached_property
    def opened(self) -> tuple[Plan, list[StoredCase]]:
        store = Store.open(self.store)
        held = {case.name: case for case in store.cases}
        if not self.cases:
            raise UserError(f"no cases of `{self.store}` were chosen for training")
        for name in self.cases:
            if name not in held:
                raise UserError(f"`{self.store}` holds no case `{name}`", hint=nearest(name, held))
        return store.plan, [held[name] for name in self.cases]

    def __getitem__(self, step: int) -> Batch | UserError:
        try:
            with _one_thread():
                return self._batch(step)
        except UserError as error:
            # returned, not raised: torch rebuilds what a worker raises from its traceback and loses the hint
            return error

    def _batch(self, step: int) -> Batch:
        plan, cases = self.opened
        size = self.sampling.patch_size or plan.patch_size
        count = self.sampling.batch_size
        batch = {
            "image": torch.empty(count, len(plan.channels), *size),  # b c x y z
            "label": torch.empty(count, *size, dtype=torch.uint8),  # b x y z
        }
        mirrored = mirrored_classes(plan)
        for i in range(count):
            index = self.rank * count + i
            position = (step * self.world * count + index) // self.sampling.patches_per_case
            case = cases[case_at(self.seed, position, len(cases))]
            generator = generator_for(self.seed, step, index)
            corner = draw_corner(generator, case, size, self.sampling)
            image, label = read_patch(case, corner, size, plan.intensity)
            augmentation = draw_augmentation(generator, self.augment, size, plan.spacing)
            # float16 becomes float32, and a turned view contiguous, in the one copy into the batch
            batch["image"][i] = apply_spatial(augmentation, image)
            batch["label"][i] = apply_label(augmentation, label, mirrored)
            if augmentation.changes:
                batch["image"][i] = apply_intensity(augmentation, batch["image"][i])
        return batch


def _in_order(steps: _Steps, start: int, stop: int, workers: int) -> Iterator[Batch]:
    loader = DataLoader(
        steps,
        batch_size=None,
        sampler=range(start, stop),
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        multiprocessing_context=_context() if workers else None,
    )
    with warnings.catch_warnings():
        # what Python 3.12 and later say about fork in any process with threads: see `_context`
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        items = iter(loader)
    while True:
        try:
            item = next(items, None)
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):
                raise
            raise UserError(
                f"a process that loads data ended: {str(error).splitlines()[0]}",
                hint="memory or shared memory (/dev/shm) ran out: fewer workers, or smaller batches",
            ) from error
        if item is None:
            return
        if isinstance(item, UserError):
            raise item
        yield item


def _context() -> str:
    """How worker processes start.

    fork on Linux: ready in milliseconds, where spawn imports torch again in each (seconds and 300 MB). Its
    danger is a lock or thread pool of the parent that the child waits for; the children use one thread, no
    CUDA and their own file handles. Elsewhere fork is missing or unsafe (macOS frameworks).
    """
    return "fork" if sys.platform == "linux" else "spawn"


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread, as in a worker: sums depend in their last bits on how many threads share them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
