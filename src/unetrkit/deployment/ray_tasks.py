"""The cases of a data set as the tasks of a Ray cluster: one a task, again where a machine was lost."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from unetrkit.data.processes import MEMORY, Each, named
from unetrkit.errors import MissingExtra, UserError

Item = TypeVar("Item")
RETRIES = 8  # of one case: machines are lost more often than a case kills its process


def ray_each(address: str | None, *, gpu: bool = False) -> Each:
    """A twin of `data.processes.for_each` whose workers are those of a Ray cluster.

    address, and what is raised: see `connect`. gpu: a task has a GPU to itself, if the cluster has any.
    """
    ray = connect(address)
    gpus = 1 if gpu and ray.cluster_resources().get("GPU") else 0

    def each(
        function: Callable[[Item], Any],
        items: Sequence[Item],
        workers: int | None = None,
        name: Callable[[Item], str] = str,
    ) -> Iterator[tuple[int, Any]]:
        """As `for_each`; the cluster says how many `workers` there are, also when it grows amid the work."""
        task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=RETRIES)(_call)
        shared = ray.put(function)  # with what it carries, such as the plan
        waiting = iter(enumerate(items))
        running: dict[Any, tuple[int, Item]] = {}
        try:
            while True:
                places = 2 * ray.cluster_resources().get("CPU", 1)
                while len(running) < places and (entry := next(waiting, None)):
                    running[task.remote(shared, entry[1])] = entry
                if not running:
                    return
                for reference in ray.wait(list(running), timeout=1)[0]:
                    position, item = running[reference]
                    with named(name(item)):
                        result = _get(ray, reference)
                    del running[reference]
                    yield position, result
        finally:
            for reference in running:
                ray.cancel(reference)

    return each


def _call(function: Callable[[Any], Any], item: Any) -> Any:
    """What a task is: ray takes no `partial`."""
    return function(item)


def connect(address: str | None) -> Any:
    """The module `ray`, in touch with a cluster.

    address: `HOST:6379`, `ray://HOST:10001`; None is the cluster that RAY_ADDRESS names or that runs on this
    machine, else a new one of this machine alone. Raises UserError without ray, and where there is no such
    cluster. Whoever reaches a Ray cluster can run programs on it: it belongs into a closed network.
    """
    try:
        import ray
    except ImportError as error:
        raise MissingExtra("work on a Ray cluster", "ray") from error
    address = address or os.environ.get("RAY_ADDRESS")
    if address not in (None, "auto", "local"):
        _require_answer(address)
    ray.init(address, ignore_reinit_error=True)
    return ray


def _require_answer(address: str) -> None:
    """Raises UserError where nothing listens: ray itself waits for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError) as error:
        hint = "`ray start --head` prints the address; without one this machine's own cores are used"
        raise UserError(f"no Ray cluster answers at `{address}`: {error}", hint=hint) from error


def _get(ray: Any, reference: Any) -> Any:
    """A task's result, or what it raised."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as error:
        raise UserError(f"its process was killed {RETRIES + 1} times", hint=MEMORY) from error
