"""Checkpoints that survive a power cut: one JSON line with the hash of what follows, then tensors only.

A run folder holds `last`, the one before it as `previous`, and `best`, weights alone. Where tensors are in
parts (`training.sharding`) `last` is a folder: such a file, `state`, and one of each part.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from unetrkit.data.files import atomic_write, put_in_place, read_problems, remove, sha256_file, write_problems
from unetrkit.errors import UserError

FORMAT = "unetrkit checkpoint 2"
HEADER = 256  # bytes, padded with spaces
ANOTHER_RUN = "restore it from a backup, or start again in another folder, with `out=…`"


def save(path: Path, state: Mapping[str, object]) -> None:
    """Writes `state` (tensors and plain values); a reader finds the old file or the new one.

    Equal states make equal files.

    Raises UserError where it cannot be written, a full disk for one; the old file is still there then.
    """
    content = io.BytesIO(b" " * HEADER)
    content.seek(HEADER)
    torch.save(_canonical(state), content)
    content.seek(0)
    content.write(_header(content.getbuffer()[HEADER:]))
    atomic_write(path, content.getvalue())


def _header(content: bytes | memoryview) -> bytes:
    header = json.dumps({"format": FORMAT, "sha256": hashlib.sha256(content).hexdigest()})
    return header.encode().ljust(HEADER - 1) + b"\n"


def load(path: Path) -> dict[str, Any]:
    """The state that `save` wrote, on the CPU; of a folder its `state`, all its files being whole.

    Raises UserError for a file that is missing, damaged or something else. Nothing in it is executed: a file
    of another program fails on its first line, and torch refuses what is not tensors and plain values.
    """
    if path.is_dir():
        state = load(path / "state") | {"folder": str(path)}
        # all that FSDP's reader would find there, and nothing elsewhere
        if state.get("shards") != {file.name: sha256_file(file) for file in path.glob("*.safetensors")}:
            raise UserError(f"`{path}` is damaged", hint=ANOTHER_RUN)
        return state
    with read_problems(path), open(path, "rb") as file:
        header = file.read(HEADER)
        if not header.startswith(json.dumps({"format": FORMAT})[:-1].encode()):
            raise UserError(f"`{path}` is not a checkpoint of this version of unetrkit", hint=ANOTHER_RUN)
        content = file.read()
    if header != _header(content):
        raise UserError(f"`{path}` is damaged: its content does not match its checksum", hint=ANOTHER_RUN)
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # what a foreign pickle makes go wrong: struct.error, EOFError, …
        raise UserError(f"`{path}` holds more than tensors and numbers", hint=ANOTHER_RUN) from error
    if not isinstance(state, dict):
        raise UserError(f"`{path}` is not the checkpoint of a run", hint=ANOTHER_RUN)
    return state


def _canonical(value: object) -> object:
    """`value` in new containers with interned strings: a pickle shows which equal strings are one object."""
    if isinstance(value, dict):
        return {_canonical(key): _canonical(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_canonical(inner) for inner in value)
    return sys.intern(value) if isinstance(value, str) else value


def save_last(folder: Path, state: Mapping[str, object], *, parts: bool = False) -> None:
    """Writes `last` and keeps the one before as `previous`; both stay if the new one cannot be written.

    parts: `last.new` is a folder that lacks this `state` alone.
    """
    new, last, old = folder / "last.new", folder / "last", folder / "previous.old"
    with write_problems(last):
        if not parts:
            remove(new)
        save(new / "state" if parts else new, state)
        if last.exists():
            put_in_place(last, folder / "previous", old)
        put_in_place(new, last, old)


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
