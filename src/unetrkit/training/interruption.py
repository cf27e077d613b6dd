"""Ctrl-C and SIGTERM: the step is finished, what was learnt is saved, the same command goes on."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from itertools import chain, islice
from types import FrameType
from typing import TypeVar

from unetrkit.ranks import this_rank

SIGNALS = (signal.SIGINT, signal.SIGTERM)
Item = TypeVar("Item")


class Stop(Exception):
    """Raised inside a stretch of work that may be abandoned."""


class Interruption:
    """Listens for SIGINT and SIGTERM in its `with` block; a second signal ends the process at once."""

    def __init__(self) -> None:
        self.asked = False
        self._abandon = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    @contextmanager
    def abandoning(self, show: Callable[[str], None]) -> Iterator[Callable[[str], None]]:
        """For work that changes nothing (a validation of many minutes): a signal raises Stop amid it.

        Of several ranks, which wait for each other, only where the work calls what this yields for `show`.
        """

        def watched(line: str) -> None:
            if self.asked:
                raise Stop
            show(line)

        self._abandon = this_rank().world == 1
        try:
            if self._abandon and self.asked:
                raise Stop
            yield watched
        finally:
            self._abandon = False

    @contextmanager
    def shielding(self, stream: Generator[Item]) -> Iterator[Iterator[Item]]:
        """`stream`, closed at the end; its first item is taken now, and processes that this starts are deaf.

        Ctrl-C, and schedulers, signal every process of a job. A loader process that ended from it would end
        the step with it, at any place; so they inherit a mask. They end when the stream is closed: at the
        exit of the interpreter multiprocessing would send them a signal and wait for ever.
        """
        with closing(stream):
            with _blocked():
                first = list(islice(stream, 1))
            yield chain(first, stream)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        if self._abandon:
            raise Stop


@contextmanager
def _blocked() -> Iterator[None]:
    """Signals wait until the block is left."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
