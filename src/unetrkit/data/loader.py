"""Training batches as a function of (seed, step): the same for any number of processes, from any step on."""

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset

from unetrkit.data.augment import (
    AugmentSettings,
    apply_intensity,
    apply_label,
    apply_spatial,
    draw_augmentation,
)
from unetrkit.data.plan import Plan
from unetrkit.data.sampling import SamplingSettings, case_at, draw_corner, generator_for, read_patch
from unetrkit.data.store import Store, StoredCase
from unetrkit.errors import UserError, nearest
from unetrkit.progress import say
from unetrkit.ranks import ALONE, Rank, first_to_say

Batch = dict[str, Tensor]
Unread = dict[str, str]  # the folders of cases that cannot be read, and what was found in them
Read = TypeVar("Read")


def batches(
    store: Path,
    cases: Sequence[str],
    sampling: SamplingSettings,
    augment: AugmentSettings,
    *,
    seed: int,
    steps: range,
    workers: int,
    rank: Rank = ALONE,
) -> Iterator[Batch]:
    """Yields the batches of these steps, in order.

    A batch is {"image": float32 (b, c, x, y, z), "label": uint8 class indices (b, x, y, z)}. Patch i of rank
    r is patch r·b + i of the step: two ranks with batch size 1 see what one rank with batch size 2 sees.

    Raises UserError: no cases, a name that the store does not hold, a damaged chunk (also from a worker).
    """
    made = Steps(store, tuple(cases), sampling, augment, seed, rank)
    _ = made.opened  # what the user got wrong is said here, before any process starts
    return in_order(made, steps, workers)


class StepBatches(Dataset[tuple[Batch, Unread] | UserError]):
    """A batch for every step, as `_batch` makes it, and what it had to leave out.

    Nothing of a store stays open, so that it may be forked or pickled.
    """

    def _batch(self, step: int, unread: Unread) -> Batch:
        raise NotImplementedError

    def cases(self, step: int) -> list[str]:
        """The cases of a step's batches on all ranks, for messages: whose was at fault no rank knows."""
        raise NotImplementedError

    def __getitem__(self, step: int) -> tuple[Batch, Unread] | UserError:
        unread: Unread = {}
        threads = torch.get_num_threads()
        # as in a worker: sums depend in their last bits on how many threads share them
        torch.set_num_threads(1)
        try:
            return self._batch(step, unread), unread
        except UserError as error:
            # returned, not raised: torch rebuilds what a worker raises from its traceback and loses the hint
            return error
        finally:
            torch.set_num_threads(threads)


def read_one(
    cases: Sequence[StoredCase], first: int, read: Callable[[int], Read], skip: bool, unread: Unread
) -> Read:
    """What `read` makes of the case with the number `first`; an error in it bears the case's name.

    Where the case cannot be read and `skip` is set it becomes one of `unread`, and the next in order is
    taken, in every process alike.
    """
    for n in (*range(first, len(cases)), *range(first)):
        name = cases[n].name
        try:
            return read(n)
        except UserError as error:
            what = error.message if str(cases[n].path) in error.message else f"case `{name}`: {error.message}"
            if not skip:
                error.args = (what,)
                error.message = what
                raise
            unread[str(cases[n].path)] = what
        except Exception as error:
            error.add_note(f"while case `{name}` was read")
            raise
    raise UserError("none of the cases can be read", hint="run `unetrkit prepare` again")


def open_cases(path: Path, names: Sequence[str]) -> tuple[Plan, list[StoredCase]]:
    """The plan of a store and the cases of these names. Raises UserError: none, or one that it lacks."""
    store = Store.open(path)
    held = {case.name: case for case in store.cases}
    if not names:
        raise UserError(f"no cases of `{path}` were chosen for training", hint="add cases to its data list")
    for name in names:
        if name not in held:
            raise UserError(f"`{path}` holds no case `{name}`", hint=nearest(name, held))
    return store.plan, [held[name] for name in names]


@dataclass(frozen=True)
class Steps(StepBatches):
    """The batch of every step."""

    store: Path
    names: tuple[str, ...]
    sampling: SamplingSettings
    augment: AugmentSettings
    seed: int
    rank: Rank = ALONE

    @cached_property
    def opened(self) -> tuple[Plan, list[StoredCase]]:
        return open_cases(self.store, self.names)

    def cases(self, step: int) -> list[str]:
        indices = range(self.sampling.batch_size * self.rank.world)
        return [self.names[n] for n in dict.fromkeys(self._case(step, index) for index in indices)]

    def _case(self, step: int, index: int) -> int:
        """Which case a patch of the step is of, counted over all ranks."""
        patch = step * self.rank.world * self.sampling.batch_size + index
        return case_at(self.seed, patch // self.sampling.patches_per_case, len(self.names))

    def _batch(self, step: int, unread: Unread) -> Batch:
        plan, cases = self.opened
        size = self.sampling.patch_size or plan.patch_size
        count = self.sampling.batch_size
        batch = {
            "image": torch.empty(count, len(plan.channels), *size),  # b c x y z
            "label": torch.empty(count, *size, dtype=torch.uint8),  # b x y z
        }
        for i in range(count):
            index = self.rank.rank * count + i

            def read(n: int, index: int = index) -> tuple[Generator, Tensor, Tensor]:
                generator = generator_for(self.seed, step, index)
                corner = draw_corner(generator, cases[n], size, self.sampling)
                return generator, *read_patch(cases[n], corner, size, plan.intensity)

            skip = self.sampling.skip_broken
            generator, image, label = read_one(cases, self._case(step, index), read, skip, unread)
            augmentation = draw_augmentation(generator, self.augment, size, plan.spacing)
            # float16 becomes float32, and a turned view contiguous, in the one copy into the batch
            batch["image"][i] = apply_spatial(augmentation, image)
            batch["label"][i] = apply_label(augmentation, label, plan.mirrored)
            if augmentation.changes:
                batch["image"][i] = apply_intensity(augmentation, batch["image"][i])
        return batch


def in_order(made: StepBatches, steps: range, workers: int) -> Iterator[Batch]:
    """The batches of these steps, in order, from so many processes (0: from this one)."""
    # fork on Linux: ready in milliseconds, where spawn imports torch again in each (seconds and 300 MB). Its
    # danger is a lock or thread pool of the parent that the child waits for; the children use one thread, no
    # CUDA and their own file handles. Elsewhere fork is missing or unsafe (macOS frameworks).
    context = ("fork" if sys.platform == "linux" else "spawn") if workers else None
    loader = DataLoader(
        made,
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        multiprocessing_context=context,
    )
    with warnings.catch_warnings():
        # what Python 3.12 and later say about fork in any process with threads: see above
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        items = iter(loader)
    said: set[str] = set()
    try:
        for step in steps:
            try:
                item = next(items)
            except RuntimeError as error:
                if not str(error).startswith("DataLoader worker"):
                    raise
                # each process is at one of the next steps: two for each are asked for ahead (torch's default)
                soon = range(step, min(step + 2 * workers, steps.stop))
                names = ", ".join(
                    list(dict.fromkeys(f"`{name}`" for s in soon for name in made.cases(s)))[:10]
                )
                what = f"a process that loads data ended, at one of {names}: {str(error).splitlines()[0]}"
                hint = "memory or shared memory (/dev/shm) ran out: fewer workers, or smaller batches"
                raise UserError(what, hint=hint) from error
            if isinstance(item, UserError):
                raise item
            batch, unread = item
            for folder, what in unread.items():
                if folder not in said and first_to_say(what):
                    say(f"warning: {what}; the next case takes its place")
                said.add(folder)
            yield batch
    finally:
        # the traceback of an error holds the iterator, and its processes are deaf to what would end them when
        # the interpreter exits: it would wait for ever
        if workers:
            items._shutdown_workers()  # type: ignore[attr-defined]
