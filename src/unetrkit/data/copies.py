"""Local copies of stores, models and runs that live on an object store; all other code works on these.

CACHE/KIND/HASH OF THE URL/NAME      the copy; a store's voxels come when they are first asked for
CACHE/KIND/HASH OF THE URL/.remote   the URL, and what tells that a file there, or here, has changed

fsspec's own caches write to a file's final name, where another process may read half of it.
"""

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from unetrkit.data.files import alone, atomic_write, read_json, write_problems
from unetrkit.data.remote import get, listing, put, url_of
from unetrkit.errors import UserError
from unetrkit.progress import say

MARK = ".remote"
HIDDEN = re.compile(r"(^|/)\.")
LOOK = 1.0  # seconds between two looks for a new checkpoint
# which files are fetched at once, of what is there
FETCHED: dict[str, Callable[[list[str]], list[str]]] = {
    "stores": lambda names: [name for name in names if name.endswith(".json")],
    "models": lambda names: [name for name in names if name.startswith("model/")] or names,
    "reports": lambda names: [name for name in names if name not in ("last", "previous", "best")],
    "runs": lambda names: [name for name in names if not HIDDEN.search(name)],
    "prepared": lambda names: [],  # what this machine prepares, and sends
}
# sent in this order after all other files: each tells of some that stand before it
LATE = {"model.json": 1, "case.json": 2, "plan.json": 3, "store.json": 4, "metrics.jsonl": 5, "last": 6}
# an object store damages no file: the checkpoint before the last is not needed, and half of all that is sent
UNSENT = {"last.new", "previous", "previous.old"}


def copy_of(path: Path, kind: str) -> Path:
    """The copy of what is at a URL, one of `FETCHED`, as it is there now; a local path is its own.

    A run is as it is here where this machine has not sent all of it. Raises UserError where something else is
    there than a run, and nothing instead of a model.
    """
    url = url_of(path)
    if url is None:
        return path
    cache = os.environ.get("UNETRKIT_CACHE") or "~/.cache/unetrkit"
    home = Path(cache).expanduser().absolute() / kind / hashlib.sha256(url.encode()).hexdigest()[:16]
    copy = home / path.name
    with write_problems(home):
        home.mkdir(mode=0o700, parents=True, exist_ok=True)  # they are scans of patients
    with alone(home / ".lock", ""):
        there = listing(url)
        if kind == "models" and not there:
            raise UserError(f"there is nothing at `{url}`", hint="check the bucket and the path in it")
        if kind == "runs" and there and "config.yaml" not in there:
            raise UserError(f"`{url}` holds something that is not a run", hint="name another `out`")
        mark = _mark(copy) or {"url": url, "there": {}, "here": {}}
        before, mark["there"] = mark["there"], there
        changed = [name for name in {**before, **there} if before.get(name) != there.get(name)]
        if kind == "runs" and changed:
            _keep_unsent(copy, mark)
        with write_problems(copy):
            for name in changed:
                (copy / name).unlink(missing_ok=True)
        _write(copy, mark)
        missing = [name for name in FETCHED[kind]([*there]) if not (copy / name).exists()]
        with ThreadPoolExecutor(16) as pool:
            # `last` first, should the run go on while this reads: what it tells of is not older then
            for names in (["last"] if "last" in missing else [], [n for n in missing if n != "last"]):
                list(pool.map(lambda name: get(url, name, copy / name), names))
        mark["here"] |= {name: _sign(copy / name) for name in missing}
        _write(copy, mark)
    return copy


def _keep_unsent(copy: Path, mark: dict[str, Any]) -> None:
    """Puts a run aside that holds what was never sent, where another machine has gone on with it."""
    if not mark["there"]:
        raise UserError(
            f"`{mark['url']}` is empty now, and its run is in `{copy}`",
            hint="make sure that it is the right place; to begin again remove the copy",
        )
    if any(_sign(copy / name) != mark["here"].get(name) for name in _files(copy)):
        aside = next(to for n in range(1, 10_000) if not (to := copy.with_name(f"{copy.name}.{n}")).exists())
        with alone(copy / ".train.lock", f"another process is training in `{mark['url']}`"):
            copy.rename(aside)
        mark["here"] = {}
        say(f"warning: `{mark['url']}` was changed elsewhere; what was not sent from here stays in `{aside}`")


def bring(copy: Path, files: Iterable[Path]) -> None:
    """Fetches files of a copy that are not there yet, once for all processes; a local store has its own."""
    missing = [file for file in files if not file.exists()]
    if missing and (mark := _mark(copy)):
        with alone(missing[0].parent / ".lock", ""):
            for file in missing:
                if not file.exists():
                    get(mark["url"], file.relative_to(copy).as_posix(), file)


def send(copy: Path) -> None:
    """Sends what has changed in a copy; a run can go on from what is there at any moment.

    Raises UserError where three tries failed, and where another machine has changed a file there.
    """
    mark = _mark(copy)
    if mark is None:
        return
    url, there, here, held = mark["url"], mark["there"], mark["here"], copy / ".last"
    # a run may go on meanwhile, and what `last` tells of must not be older there: hold it, then read others
    with write_problems(held), suppress(FileNotFoundError):
        held.unlink(missing_ok=True)
        os.link(copy / "last", held)
    files = {name: copy / name for name in _files(copy) if name != "last"}
    files |= {"last": held} if held.exists() else {}
    signs = {name: _sign(file) for name, file in files.items()}
    names = [name for name, sign in signs.items() if sign and sign != here.get(name)]
    names.sort(key=lambda name: LATE.get(PurePosixPath(name).name, 0))
    now = listing(url) if names else {}
    if others := [name for name in names if name in now and now[name] != there.get(name)]:
        raise UserError(
            f"another machine has changed `{others[0]}` of `{url}` since this one read or sent it",
            hint="let one machine at a time write there",
        )
    for number, name in enumerate(names):
        there[name], here[name] = put(files[name], url, name), signs[name]
        if number % (1 + len(names) // 32) == 0 or name == names[-1]:
            _write(copy, mark)


@contextmanager
def sending(copy: Path) -> Iterator[None]:
    """Sends a run at its beginning, after each checkpoint beside the training, and at its end.

    What cannot be sent under way is a warning, and is tried again after the next checkpoint. Raises UserError
    where it cannot at the beginning, when nothing is lost, or at the end.
    """
    if _mark(copy) is None:
        yield
        return
    send(copy)
    over, last = threading.Event(), copy / "last"

    def follow() -> None:
        tried = _sign(last)
        while not over.wait(LOOK):
            if (now := _sign(last)) and now != tried:
                tried = now
                try:
                    send(copy)
                except UserError as problem:
                    say(f"warning: {problem.message}; training goes on, and the next checkpoint tries again")

    follower = threading.Thread(target=follow, daemon=True)
    follower.start()
    try:
        yield
    finally:
        over.set()
        follower.join()
        try:
            send(copy)
        except UserError as problem:
            hint = f"{problem.hint}; the same command on this machine sends the rest"
            raise UserError(f"{problem.message}; the whole run is in `{copy}`", hint=hint) from problem


def _files(copy: Path) -> list[str]:
    """The files of a copy that are sent; unlike a glob this bears a folder that is replaced meanwhile."""
    found = [Path(folder, name) for folder, _, names in os.walk(copy) for name in names]
    names = sorted(file.relative_to(copy).as_posix() for file in found)
    return [name for name in names if not HIDDEN.search(name) and name not in UNSENT]


def _sign(file: Path) -> list[int] | None:
    """What changes when a file is written again; None where there is none."""
    with suppress(FileNotFoundError):
        return [(found := file.stat()).st_size, found.st_mtime_ns]
    return None


def _mark(copy: Path) -> Any:
    """What is known of a copy: its URL, what was last seen there and here; None where the folder is none."""
    return read_json(copy.parent / MARK) if (copy.parent / MARK).is_file() else None


def _write(copy: Path, mark: dict[str, Any]) -> None:
    atomic_write(copy.parent / MARK, json.dumps(mark).encode())
