"""metrics.jsonl across resumes; what the live line says."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from unetrkit.errors import UserError
from unetrkit.training.log import Metrics, Progress


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_records_after_the_checkpoint_and_torn_lines_are_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with Metrics(path, {"training": 0, "validation": 0}) as metrics:
        for step in (5, 10, 15):
            metrics.write(step, "training", {"loss": step / 2})
            metrics.write(step, "validation", {"dice": 0.5})
    path.write_bytes(path.read_bytes() + b'{"step": 20, "ev')
    with Metrics(path, {"training": 10, "validation": 5}) as metrics:  # stopped before step 10's validation
        metrics.write(10, "validation", {"dice": math.nan})
    assert [(r["step"], r["event"][0]) for r in records(path)] == [(5, "t"), (5, "v"), (10, "t"), (10, "v")]
    assert records(path)[-1] == {"step": 10, "event": "validation", "dice": None}


def test_a_torn_line_within_the_checkpoint_is_cut_off_too(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = b'{"step": 1, "event": "training"}\n'
    path.write_bytes(whole + whole[:-1])
    with Metrics(path, {"training": 10, "validation": 10}):
        pass
    assert path.read_bytes() == whole


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
