"""`predictions.json`: how each label map in a folder was made, and by which it is known again."""

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from unetrkit.data.datalist import Case
from unetrkit.data.files import alone, atomic_write, read_json, sha256_file, sync_folder, write_problems
from unetrkit.data.volume import files_of
from unetrkit.errors import UserError

RECORD = "predictions.json"
LOCK = ".predict.lock"
FORMAT = "unetrkit-predictions"


class Record:
    """The record of the folder `out`; where it is `shared`, other processes write into it at the same time.

    Raises UserError where `predictions.json` is something else.
    """

    def __init__(self, out: Path, *, shared: bool) -> None:
        self.out, self.shared = out, shared
        self.cases = self._read()

    def holds(self, case: Case, made: Mapping[str, Any]) -> bool:
        """Whether a case's label map is there, made as `made` says from the images as they are now."""
        entry, label = self.cases.get(case.name, {}), self._label(case)
        if _identity(entry) != _identity(made) or not label.is_file():
            return False
        return entry.get("label_sha256") == sha256_file(label) and entry.get("source") == _source(case)

    def add(self, case: Case, made: Mapping[str, Any]) -> None:
        """Records the label map that is written at `draft`, then gives it its name.

        A kill in between leaves a record without a label map, which is made again, and never a label map that
        nobody is known to have written, which would not be replaced.
        """
        written, label = draft(self.out, case), self._label(case)
        files = {"label": label.name, "images": [str(image) for image in case.images]}
        hashes = {"source": _source(case), "label_sha256": sha256_file(written)}
        self._change(case.name, {**files, **hashes, **made})
        with write_problems(label):
            os.replace(written, label)
            sync_folder(self.out)

    def drop(self, case: Case) -> None:
        """Removes a recorded label map, and that it was there."""
        if case.name in self.cases:
            self._label(case).unlink(missing_ok=True)
            self._change(case.name, None)

    def _label(self, case: Case) -> Path:
        return self.out / f"{case.name}.nii.gz"

    def _change(self, name: str, entry: dict[str, Any] | None) -> None:
        # an empty message waits for the lock
        lock: AbstractContextManager[None] = alone(self.out / LOCK, "") if self.shared else nullcontext()
        with lock:
            if self.shared:
                self.cases = self._read()
            self.cases.pop(name, None)
            if entry is not None:
                self.cases[name] = entry
            content = {"format": FORMAT, "version": 1, "cases": self.cases}
            atomic_write(self.out / RECORD, (json.dumps(content, indent=1) + "\n").encode())

    def _read(self) -> dict[str, Any]:
        path = self.out / RECORD
        content = read_json(path) if path.exists() else {"format": FORMAT, "cases": {}}
        if not isinstance(content, dict) or content.get("format") != FORMAT or "cases" not in content:
            raise UserError(f"`{path}` is not the record of a prediction", hint="choose another folder")
        return dict(content["cases"])


def draft(out: Path, case: Case) -> Path:
    """Where the label map of a case is written before it is recorded."""
    return out / f".{case.name}.new.nii.gz"


def _identity(made: Mapping[str, Any]) -> object:
    """What decides the voxels of a label map: weights and settings, not where or how fast."""
    weights = [model["sha256"] for model in made.get("models", [])]
    return weights, {**made.get("settings", {}), "device": None, "window_batch": None}


def _source(case: Case) -> str:
    files = [sha256_file(file) for path in case.images for file in files_of(path)]
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()
