"""Checkpoints that survive a power cut: one JSON line with the hash of what follows, then tensors only.

A run folder holds `last`, the one before it as `previous`, and `best`.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from unetrkit.data.files import atomic_write, read_problems, sync_folder, write_problems
from unetrkit.errors import UserError

FORMAT = "unetrkit checkpoint 2"
HEADER = 256  # bytes, padded with spaces
ANOTHER_RUN = "start again in another folder, with `out=…`"


def save(path: Path, state: dict[str, object]) -> None:
    """Writes `state` (tensors and plain values); a reader finds the old file or the new one.

    Equal states make equal files.

    Raises UserError where it cannot be written, a full disk for one; the old file is still there then.
    """
    content = io.BytesIO(b" " * HEADER)
    content.seek(HEADER)
    torch.save(_canonical(state), content)
    digest = hashlib.sha256(content.getbuffer()[HEADER:]).hexdigest()
    header = json.dumps({"format": FORMAT, "sha256": digest}).encode()
    content.seek(0)
    content.write(header.ljust(HEADER - 1) + b"\n")
    atomic_write(path, content.getvalue())


def load(path: Path) -> dict[str, Any]:
    """The state that `save` wrote, on the CPU.

    Raises UserError for a file that is missing, damaged or something else. Nothing in it is executed: a file
    of another program fails on its first line, and torch refuses what is not tensors and plain values.
    """
    with read_problems(path), open(path, "rb") as file:
        header = file.read(HEADER)
        try:
            found = json.loads(header)
            known = isinstance(found, dict) and found.get("format") == FORMAT
        except ValueError:
            known = False
        if not known:
            raise UserError(f"`{path}` is not a checkpoint of this version of unetrkit", hint=ANOTHER_RUN)
        content = file.read()
    if hashlib.sha256(content).hexdigest() != found.get("sha256"):
        raise UserError(f"`{path}` is damaged: its content does not match its checksum", hint=ANOTHER_RUN)
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(f"`{path}` holds more than tensors and numbers", hint=ANOTHER_RUN) from error


def _canonical(value: object) -> object:
    """`value` in new containers with interned strings: a pickle shows which equal strings are one object."""
    if isinstance(value, dict):
        return {_canonical(key): _canonical(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_canonical(inner) for inner in value)
    return sys.intern(value) if isinstance(value, str) else value


def save_last(folder: Path, state: dict[str, object]) -> None:
    """Writes `last` and keeps the one before as `previous`; both stay if the new one cannot be written."""
    new, last = folder / "last.new", folder / "last"
    save(new, state)
    with write_problems(last):
        if last.exists():
            os.replace(last, folder / "previous")
        os.replace(new, last)
        sync_folder(folder)


def load_last(folder: Path, warn: Callable[[str], None]) -> dict[str, Any] | None:
    """The newest whole checkpoint of a run; None where there is none yet.

    Where `last` is damaged or missing `previous` is taken, and `warn` is told. Raises UserError where neither
    can be read.
    """
    found = [path for path in (folder / "last", folder / "previous") if path.exists()]
    for path in found:
        try:
            return load(path)
        except UserError as error:
            if path == found[-1]:
                raise
            warn(f"{error.message}; going on from `{found[-1]}`")
    return None
