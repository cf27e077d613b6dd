"""One function over many cases, on many processes."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from operator import attrgetter
from typing import Any, TypeVar

from unetrkit.errors import UserError
from unetrkit.progress import Progress

Item = TypeVar("Item")
Result = TypeVar("Result")

# what `for_each` is: (function, items, workers, name) -> (position, result) of each item as it is finished
Each = Callable[..., Iterator[tuple[int, Any]]]

MEMORY = "most likely the memory ran out: use fewer workers (`--workers 1` at the least)"


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def for_each(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    workers: int | None = None,
    name: Callable[[Item], str] = str,
    patience: float = 5.0,
) -> Iterator[tuple[int, Result]]:
    """Yields (position, result) of every item as it is finished; `workers` None means one for each core.

    A worker has one item at a time in memory. `function` and the items are sent to it: a function of a
    module, or a `functools.partial` of one. One worker is this process itself, and so it is where all of the
    work takes less than `patience` seconds, judged by the second item: a new process needs about as long to
    import torch.
    Raises what `function` raises, after the items that are under way; a UserError names the item.
    """
    workers = min(cores() if workers is None else workers, len(items))
    waiting = iter(enumerate(items))
    for position, item in waiting:
        begin = time.monotonic()
        with named(name(item)):
            result = function(item)
        seconds = time.monotonic() - begin
        yield position, result
        if workers > 1 and position == 1 and seconds * len(items) > patience:
            break
    else:
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin)
    running: dict[Future[Result], tuple[int, Item]] = {}
    try:
        while True:
            # two for each worker: the next one is there when one is done, and a failure ends the work soon
            while len(running) < 2 * workers and (entry := next(waiting, None)):
                running[pool.submit(function, entry[1])] = entry
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                position, item = running[future]
                with named(name(item)):
                    result = future.result()
                del running[future]
                yield position, result
    except BrokenProcessPool as error:
        names = ", ".join(f"`{name(item)}`" for _, item in running.values())
        message = f"a worker process was killed while it worked on one of {names}"
        raise UserError(message, hint=MEMORY) from error
    finally:
        pool.shutdown(cancel_futures=True)


def map_cases(
    function: Callable[[Item], Result],
    cases: Sequence[Item],
    workers: int | None,
    progress: Progress | None,
    each: Each = for_each,
) -> list[Result]:
    """The results of all cases, in their order, whatever the workers did; `each` says where they are.

    `cases` are anything that has a `name`.
    """
    results: dict[int, Result] = {}
    name = attrgetter("name")
    for position, result in each(function, cases, workers, name):
        results[position] = result
        if progress:
            progress(len(results), len(cases), name(cases[position]))
    return [results[position] for position in range(len(cases))]


@contextmanager
def named(name: str) -> Iterator[None]:
    """Says in a UserError which case it is about."""
    try:
        yield
    except MemoryError as error:
        raise UserError(f"case `{name}`: there is not enough memory: {error}", hint=MEMORY) from error
    except UserError as error:
        if name in error.message:
            raise
        raise UserError(f"case `{name}`: {error.message}", hint=error.hint) from error


def _begin() -> None:
    """In a new worker: one thread, no traceback at Ctrl-C, no life without the process that started it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["OMP_NUM_THREADS"] = "1"
    if torch := sys.modules.get("torch"):  # else it will read the variable
        torch.set_num_threads(1)
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)
