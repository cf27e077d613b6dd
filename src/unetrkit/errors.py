"""What a user can cause: one message, one hint, one exit code."""

import difflib
from collections.abc import Iterable
from enum import IntEnum
from pathlib import Path


class ExitCode(IntEnum):
    DONE = 0
    FAILED = 1
    WRONG_USE = 2
    INTERRUPTED = 130


class UserError(Exception):
    """Something the user gave cannot be used: what was expected, what was found, in which file.

    The hint is never optional: it says in a few words what to do next, and does not repeat the message.

    The command line prints it as ``error: MESSAGE`` and ``hint: HINT`` and exits with code 2.
    A programming error is never a UserError: it keeps its traceback.

    >>> str(UserError("`train.lrr` is not a setting", hint="did you mean `train.lr`?"))
    '`train.lrr` is not a setting'
    """

    def __init__(self, message: str, *, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[object, ...]:  # a worker process must not lose the hint
        return _rebuilt, (type(self), self.message, self.hint)


class Interrupted(Exception):
    """Long work was asked to stop and has saved what it needs to go on; the command exits with code 130."""

    def __init__(self, message: str, *, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class MissingExtra(UserError):
    """An optional dependency is not installed; the hint names the extra that brings it."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} needs the `{extra}` extra", hint=f"pip install 'unetrkit[{extra}]'")


def refuse_pipe(path: Path) -> None:
    """Raises UserError for a pipe or a device: reading it may wait for ever, or never end."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(f"`{path}` is a pipe or a device, not a file", hint="write it to a file first")


def _rebuilt(kind: type[UserError], message: str, hint: str) -> UserError:
    error = kind.__new__(kind)
    UserError.__init__(error, message, hint=hint)
    return error


def printable(text: str) -> str:
    r"""Lines that a terminal shows and does not obey, whatever a file's name or content was.

    >>> printable("a\x1b[2Jb\nc")
    'a\\x1b[2Jb\nc'
    """
    return "".join(one if one.isprintable() or one == "\n" else ascii(one)[1:-1] for one in text)


def many(count: int, noun: str) -> str:
    """A number of things in words.

    >>> many(1, "case"), many(2, "case")
    ('1 case', '2 cases')
    """
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence that leads from a wrong name to a right one.

    >>> nearest("swin_untr_tiny", ["unetr", "swin_unetr_tiny"])
    'did you mean `swin_unetr_tiny`?'
    >>> nearest("x", ["b", "a"])
    'known: a, b'
    """
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean `{close[0]}`?" if close else "known: " + ", ".join(known)
