"""metrics.jsonl across resumes; what the live line says."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from unetrkit.errors import UserError
from unetrkit.training.log import Metrics, Progress
from unetrkit.training.trackers import _records


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_records_after_the_checkpoint_and_torn_lines_are_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with Metrics(path, {"training": 0, "validation": 0}) as metrics:
        mark = metrics.sync()
        for step in (5, 10, 15):
            metrics.write(step, "training", {"loss": step / 2})
            metrics.write(step, "validation", {"dice": 0.5})
            mark = metrics.sync() if step == 5 else mark
    path.write_bytes(path.read_bytes() + b'{"step": 20, "ev')
    with Metrics(path, {}, mark) as metrics:
        metrics.write(10, "validation", {"dice": math.nan})
    assert [(r["step"], r["event"][0]) for r in records(path)] == [(5, "t"), (5, "v"), (10, "v")]
    assert records(path)[-1] == {"step": 10, "event": "validation", "dice": None}


def test_a_damaged_log_is_said_and_kept_with_its_whole_records(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "metrics.jsonl"
    with Metrics(path, {}) as metrics:
        for step in (1, 2, 3):
            metrics.write(step, "training", {"loss": 0.5})
        mark = metrics.sync()
        metrics.write(4, "training", {"loss": 0.5})
    damaged = path.read_bytes().replace(b'"step": 2', b'"step" 2')
    path.write_bytes(damaged)
    with Metrics(path, {"training": 3, "validation": 0}, mark):
        pass
    assert [record["step"] for record in records(path)] == [1, 3]
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == damaged
    assert "is not what was written" in capsys.readouterr().err


@pytest.mark.parametrize(("make", "message"), [(os.mkfifo, "is a pipe"), (os.mkdir, "is a folder")])
def test_a_log_that_is_no_file_is_a_user_error(
    tmp_path: Path, make: Callable[[Path], None], message: str
) -> None:
    make(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match=message):
        Metrics(tmp_path / "metrics.jsonl", {})
    with pytest.raises(UserError, match=message):
        list(_records(tmp_path / "metrics.jsonl"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_a_user_error(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"cannot write `.*metrics\.jsonl`: No space"),
        Metrics(tmp_path / "metrics.jsonl", {}) as metrics,
    ):
        metrics._file.close()
        metrics._file = open("/dev/full", "ab")
        metrics.write(1, "training", {"loss": 1.0})


def test_without_a_terminal_the_first_and_last_steps_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(100, 104, patches_per_step=4) as progress:
        for step in range(101, 105):
            progress.step(step, 0.5)
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == ""
    assert [line.split("  ")[0] for line in lines] == ["step 101/104", "step 104/104"]
    assert "loss 0.5000" in lines[1]
    assert lines[-1].endswith("0 s left") and "patches/s" in lines[0]


def test_a_run_of_days_says_once_what_to_lower_and_a_validation_how_far_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 1000, 60))
    monkeypatch.setattr("unetrkit.training.log.time", SimpleNamespace(monotonic=lambda: next(clock)))
    with Progress(0, 10_000, patches_per_step=1, slow="lower it") as progress:
        for step in range(1, 6):
            progress.step(step, 0.5)
        progress.show("validating 3/10")
    said = capsys.readouterr().err
    assert said.count("lower it") == 1 and "6 d 22 h left; lower it" in said
    assert said.endswith("validating 3/10\n")
