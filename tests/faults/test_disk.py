"""A full disk amid a run: it is said, what was saved stays, and with space the run ends bitwise the same."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from tests.training.several import cubes, ranks

from unetrkit.training import checkpoint
from unetrkit.training.loop import LoopSettings

SETTINGS = LoopSettings(steps=12, validate_every=4, save_every=2, log_every=1, device="cpu", amp="off")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "none", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    yield disk
    subprocess.run(["umount", disk], check=True)


def fill(disk: Path, step: int) -> None:
    """Takes what is free on the disk, at the seventh step."""
    if step == 7 and not (disk / "filler").exists():
        with open(disk / "filler", "wb") as file:
            free = os.statvfs(disk)
            file.write(bytes(free.f_bavail * free.f_frsize))


def limit(step: int) -> None:
    """From the seventh step on no file may be longer than a metrics.jsonl of twelve steps."""
    if step == 7:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))


@pytest.mark.faults
def test_a_full_disk_leaves_the_last_checkpoint(small_disk: Path, tmp_path: Path) -> None:
    stopped(tmp_path, small_disk / "run", partial(fill, small_disk))
    (small_disk / "filler").unlink()
    goes_on(tmp_path, small_disk / "run")


def test_a_file_that_cannot_grow_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    stopped(tmp_path, tmp_path / "run", limit)
    goes_on(tmp_path, tmp_path / "run")


def stopped(folder: Path, run: Path, before: Callable[[int], None]) -> None:
    codes, said = ranks(1, folder / "log", cubes, run, SETTINGS, before)
    assert codes == [2]
    assert f"error: cannot write `{run}" in said[0]
    assert "hint: free some space there, or choose another folder" in said[0]
    assert checkpoint.load(run / "last")["state"]["step"] == 6


def goes_on(folder: Path, run: Path) -> None:
    codes, said = ranks(1, folder / "log", cubes, run, SETTINGS)
    assert codes == [0] and "going on from step 6 of 12" in said[0]
    assert ranks(1, folder / "log", cubes, folder / "whole", SETTINGS)[0] == [0]
    for name in ("last", "best", "metrics.jsonl", "exported"):
        assert (run / name).read_bytes() == (folder / "whole" / name).read_bytes(), name
