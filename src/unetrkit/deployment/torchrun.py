"""A command of ours in several processes, by torchrun, which stops as one process does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from unetrkit.errors import ExitCode

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Nodes:
    """The machines of a job: how many, which one this is, and `host:port` on the first."""

    count: int = 1
    number: int = 0
    address: str = ""


ONE_NODE = Nodes()


def torchrun(words: Sequence[str], processes: int, nodes: Nodes = ONE_NODE, restarts: int = 0) -> list[str]:
    """The command that runs `unetrkit WORDS` in so many processes on each node, or without torchrun in one.

    restarts: how often all of them begin again when one has died; training goes on from its checkpoint.

    >>> torchrun(["info", "environment"], 2)[1:]  # doctest: +ELLIPSIS
    ['-m', 'unetrkit.deployment.torchrun', '--nproc-per-node=2', ..., 'unetrkit', 'info', 'environment']
    """
    if processes * nodes.count == 1:
        return [sys.executable, "-m", "unetrkit", *words]
    meeting = ["--standalone"]
    if nodes.count > 1:
        host, _, port = nodes.address.rpartition(":")
        meeting = [f"--nnodes={nodes.count}", f"--node-rank={nodes.number}"]
        meeting += [f"--master-addr={host}", f"--master-port={port}"]
    options = [f"--nproc-per-node={processes}", *meeting, f"--max-restarts={restarts}"]
    return [sys.executable, "-m", "unetrkit.deployment.torchrun", *options, "-m", "unetrkit", *words]


def run(command: Sequence[str], grace_seconds: int = 120) -> int:
    """Runs a command to its end; Ctrl-C and SIGTERM reach it once, as SIGTERM. Its exit code, or 130.

    grace_seconds: what torchrun leaves to the processes for saving; its own limit is 30.
    """
    with started(command, grace_seconds) as child, forwarding(child, SIGNALS) as asked:
        code = child.wait()
    return 130 if asked else code


@contextmanager
def started(command: Sequence[str], grace_seconds: int) -> Iterator[subprocess.Popen[bytes]]:
    """A running command, in a session of its own, which does not outlive the block.

    A terminal and Slurm signal every process of a group, and torchrun passes on what it gets: a process of
    ours would get two signals, and the second one ends it at once.
    """
    environment = os.environ | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(grace_seconds)}
    child = subprocess.Popen(list(command), env=environment, start_new_session=True)  # noqa: S603
    try:
        yield child
    finally:
        if child.poll() is None:
            child.terminate()
            child.wait()


@contextmanager
def forwarding(child: subprocess.Popen[bytes], signals: Sequence[signal.Signals]) -> Iterator[list[int]]:
    """Passes signals on to a running command, the first one only; gives those that came.

    A handler that another library had set before is called after that.
    """
    asked: list[int] = []
    before = {number: signal.getsignal(number) for number in signals}

    def pass_on(number: int, frame: FrameType | None) -> None:
        if not asked and child.poll() is None:
            child.send_signal(signal.SIGTERM)
        asked.append(number)
        earlier = before[signal.Signals(number)]
        if callable(earlier) and earlier is not signal.default_int_handler:
            earlier(number, frame)

    for number in signals:
        signal.signal(number, pass_on)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":  # torchrun itself ends with 1 and a trace, whatever a process has said before
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    try:
        main()
    except ChildFailedError as error:
        if error.get_first_failure()[1].exitcode != ExitCode.WRONG_USE:
            raise
        sys.exit(ExitCode.WRONG_USE)
