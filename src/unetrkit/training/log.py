"""What a run says: `metrics.jsonl` for programs, one live line on stderr for people."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from io import BufferedWriter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from unetrkit.data.files import atomic_write, read_start, write_problems
from unetrkit.errors import printable
from unetrkit.ranks import this_rank

PLAIN_SECONDS = 30  # between two lines where stderr is not a terminal
DAY = 86400  # seconds


class Metrics:
    """`metrics.jsonl`, by rank 0: a record a line, appended. No times: a resumed run has the same bytes."""

    def __init__(
        self,
        path: Path,
        upto: Mapping[str, int],
        mark: Mapping[str, Any] | None = None,
        mirror: Callable[[int, str, Mapping[str, float]], None] = lambda step, event, values: None,
    ) -> None:
        """Opens the file; what a killed process wrote after the checkpoint with `mark` is cut off.

        mirror: gets every record that is written.

        A file that is not what `mark` says stays as metrics.jsonl.damaged; its whole records are taken over,
        those of each event to the last step `upto`.
        """
        self._file: BufferedWriter | None = None
        if not this_rank().first:
            return
        content = read_start(path, -1) if path.exists() else b""
        kept = content[: mark["bytes"]] if mark else b""
        if mark and hashlib.sha256(kept).hexdigest() != mark["sha256"]:
            if content:
                atomic_write(path.with_name(f"{path.name}.damaged"), content)
            kept = b"".join(line for line in content.splitlines(keepends=True) if _is_record(line, upto))
            say(
                f"warning: `{path}` is not what was written; it stays as `{path.name}.damaged`, and its "
                "whole records are taken over"
            )
        atomic_write(path, kept)
        self._path, self._mirror = path, mirror
        self._file = open(path, "ab")
        self._bytes, self._hash = len(kept), hashlib.sha256(kept)

    def write(self, step: int, event: str, values: Mapping[str, float]) -> None:
        """Appends {"step", "event", …}; NaN and infinity, which JSON does not have, become null."""
        if self._file is None:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        record = json.dumps({"step": step, "event": event, **finite}, ensure_ascii=False).encode() + b"\n"
        with write_problems(self._path):
            self._file.write(record)
            self._file.flush()
        self._bytes += len(record)
        self._hash.update(record)
        self._mirror(step, event, values)

    def sync(self) -> dict[str, Any]:
        """On disk before the checkpoint that vouches for it, with the mark that this returns."""
        if self._file is None:
            return {}
        with write_problems(self._path):
            os.fsync(self._file.fileno())
        return {"bytes": self._bytes, "sha256": self._hash.hexdigest()}

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            with write_problems(self._path):  # what a full disk did not take is tried once more
                self._file.close()


def _is_record(line: bytes, upto: Mapping[str, int]) -> bool:
    try:
        record = json.loads(line)
        return line.endswith(b"\n") and record["step"] <= upto[record["event"]]
    except (ValueError, KeyError, TypeError):
        return False


class Progress:
    """The live line; where stderr is not a terminal, a plain line now and then."""

    def __init__(self, start: int, stop: int, patches_per_step: int, slow: str = "") -> None:
        """`slow` is said, once, where the third step shows that the run takes more than a day."""
        self._console = _console()
        self._live = Live(console=self._console, refresh_per_second=4, transient=True)
        self._start, self._stop, self._patches = start, stop, patches_per_step
        self._began = self._said = time.monotonic()
        self._paused = 0.0
        self._slow = slow

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def step(self, step: int, loss: float) -> None:
        """Called after every step, `step` being how many are done."""
        now = time.monotonic()
        terminal = self._console.is_terminal
        seconds = (now - self._began - self._paused) / (step - self._start)
        if step == self._start + 3 and self._slow and seconds * (self._stop - step) > DAY:
            self.say(f"{duration(seconds * (self._stop - step))} left; {self._slow}")
        if not terminal and now - self._said < PLAIN_SECONDS and step not in (self._start + 1, self._stop):
            return
        self._said = now
        left = duration(seconds * (self._stop - step))
        rate = self._patches / max(seconds, 1e-9)
        line = f"step {step}/{self._stop}  loss {loss:.4f}  {rate:.3g} patches/s  {left} left"
        if terminal:
            self._live.update(Text(line))
        else:
            self._console.print(line, markup=False)

    def show(self, line: str) -> None:
        """What is done between two steps, such as a validation."""
        now = time.monotonic()
        if self._console.is_terminal:
            self._live.update(Text(line))
        elif now - self._said >= PLAIN_SECONDS:
            self._said = now
            self.say(line)

    def pause(self, seconds: float) -> None:
        """Time that was not training: validation, saving."""
        self._paused += seconds

    def say(self, line: str) -> None:
        """A line that stays."""
        self._console.print(line, markup=False)


def say(line: str) -> None:
    """A line for people, on stderr."""
    _console().print(printable(line), markup=False)


def _console() -> Console:
    return Console(stderr=True, highlight=False, soft_wrap=True, quiet=not this_rank().first)


def duration(seconds: float) -> str:
    """Whole units, two at most.

    >>> [duration(s) for s in (4.2, 75, 3725, 200_000)]
    ['4 s', '1 min 15 s', '1 h 2 min', '2 d 7 h']
    """
    left = round(seconds)
    parts: list[str] = []
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count or parts:
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2]) or "0 s"
