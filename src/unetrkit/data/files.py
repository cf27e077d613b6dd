"""Whole files: a reader finds the old one or the new one, never half of one."""

import difflib
import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedWriter
from pathlib import Path
from weakref import WeakSet

from unetrkit.errors import UserError, refuse_pipe

# locks are for the process that took them: one that loads data outlives a killed parent for seconds
HELD: WeakSet[BufferedWriter] = WeakSet()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: list(map(BufferedWriter.close, HELD)))
LARGEST_JSON = 256 * 2**20  # bytes; a data list of 100,000 cases is about 30 MB


def atomic_write(path: Path, content: bytes) -> None:
    """Puts `content` at `path`: at any moment, a power cut included, the file is the old one or the new one.

    Raises UserError where the disk is full or the folder cannot be written; the old file stays.
    """
    temporary = path.with_name(f".{path.name[:80]}.{secrets.token_hex(6)}.tmp")
    with write_problems(path):
        try:
            with open(temporary, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Makes the names in a folder (a rename, a new file) survive a power cut; nothing to do on Windows."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put_in_place(new: Path, path: Path, aside: Path) -> None:
    """Renames a file or a folder; what was at `path` is whole there, or `aside`, until `new` is there."""
    if path.exists():
        remove(aside)
        os.rename(path, aside)
    os.rename(new, path)
    sync_folder(path.parent)
    remove(aside)


def remove(path: Path) -> None:
    """Removes a file, a link, a folder with all that is in it, or nothing where there is none."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


@contextmanager
def write_problems(path: Path) -> Iterator[None]:
    """Turns what the operating system says about writing `path` into a UserError."""
    try:
        yield
    except OSError as error:
        hint = "choose a folder that you may write to"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            hint = "free some space there, or choose another folder"
        raise UserError(f"cannot write `{path}`: {error.strerror or error}", hint=hint) from error


@contextmanager
def read_problems(path: Path) -> Iterator[None]:
    """Turns what the operating system says about reading `path`, or a pipe, into a UserError."""
    try:
        refuse_pipe(path)
        yield
    except FileNotFoundError as error:
        raise UserError(f"there is no file `{path}`", hint=_where_instead(path)) from error
    except IsADirectoryError as error:
        raise UserError(f"`{path}` is a folder", hint="give a file in it") from error
    except OSError as error:
        hint = "make sure that you may read it and that its disk is there"
        raise UserError(f"cannot read `{path}`: {error.strerror or error}", hint=hint) from error


def _where_instead(path: Path) -> str:
    """A hint for a file that is not there: one of nearly its name, or the first folder that is missing."""
    missing = next((folder for folder in reversed(path.parents) if not folder.is_dir()), None)
    if missing is not None:
        return f"there is no folder `{missing}` either: check the path"
    names = os.listdir(path.parent)[:1000] if os.access(path.parent, os.R_OK) else []
    if close := difflib.get_close_matches(path.name, names, n=1, cutoff=0.8):
        return f"did you mean `{path.with_name(close[0])}`?"
    return "check the path" if path.is_absolute() else f"relative paths start at `{Path.cwd()}`"


@contextmanager
def alone(lock: Path, otherwise: str, *, shared: bool = False) -> Iterator[None]:
    """Holds the file `lock`, which the system releases however this process ends. Not on Windows.

    Several may hold it `shared`, as long as nobody holds it alone.
    Raises UserError, saying `otherwise`, where another process holds it; waits for that one if it is empty.
    """
    if os.name != "posix":
        yield
        return
    import fcntl

    with write_problems(lock):
        file = open(lock, "ab")
    HELD.add(file)
    with file:
        try:
            kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
            fcntl.flock(file, kind | (fcntl.LOCK_NB if otherwise else 0))
        except BlockingIOError as error:
            raise UserError(otherwise, hint="wait until it has finished") from error
        yield


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal. Raises UserError where it cannot be read."""
    with read_problems(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_start(path: Path, size: int) -> bytes:
    """At most `size` bytes of a file, all for -1. Raises UserError for what cannot be read, or is a pipe."""
    with read_problems(path), open(path, "rb") as file:
        return file.read(size)


def read_json(path: Path) -> object:
    """What a JSON file holds. Raises UserError where it is missing, not JSON, not UTF-8, or far too large."""
    content = read_start(path, LARGEST_JSON + 1)
    try:
        if len(content) > LARGEST_JSON:
            raise ValueError(f"it is larger than {LARGEST_JSON // 2**20} MB")
        return json.loads(content.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        reason = f"line {error.lineno}, column {error.colno}: {error.msg}"
    except UnicodeDecodeError as error:
        reason = f"byte {error.start} is not UTF-8"
    except RecursionError:
        reason = "it is nested too deeply"
    except ValueError as error:  # too large, or a number of thousands of digits
        reason = str(error)
    raise UserError(f"`{path}` is not JSON: {reason}", hint="correct it in a text editor, or write it again")
