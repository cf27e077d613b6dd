"""Progress of long work on stderr: a live bar with an ETA on a terminal, elsewhere a line now and then."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[..., None]  # (done, total, note=""); done may be a fraction
PLAIN_INTERVAL_SECONDS = 10.0


@contextmanager
def progress(title: str) -> Iterator[Progress]:
    """Yield a function ``report(done, total, note="")`` that shows how far `title` is.

    Library code takes such a function as an argument and never prints by itself.
    """
    if sys.stderr.isatty():
        yield from _live(title)
    else:
        yield from _plain(title)


def _live(title: str) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar
    from rich.table import Column

    # in one line of 80 columns: what the others leave is for the note
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=8),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn(
            "{task.fields[note]}",
            style="dim",
            markup=False,
            table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"),
        ),
    )
    with Bar(*columns, console=Console(stderr=True), expand=True) as bar:
        task = bar.add_task(title, total=None, note="")
        yield lambda done, total, note="": bar.update(task, completed=done, total=total, note=note)


def _plain(title: str) -> Iterator[Progress]:
    start = last = time.monotonic()

    def report(done: float, total: int, note: str = "") -> None:
        nonlocal last
        now = time.monotonic()
        if done < total and now - last < PLAIN_INTERVAL_SECONDS:
            return
        last = now
        left = f", about {(now - start) / done * (total - done):.0f} s left" if 0 < done < total else ""
        print(f"{title} {int(done)}/{total} after {now - start:.0f} s{left} {note}".rstrip(), file=sys.stderr)

    yield report


def say(line: str) -> None:
    """A line on stderr; it stays above a live bar."""
    print(line, file=sys.stderr)
