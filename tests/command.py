"""Run the command line in this process and see what a user would see."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from unetrkit.cli import main


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


class CommandLine:
    """`run("check", path)` is `unetrkit check path`: exit code, stdout and stderr."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *words: str | Path) -> Outcome:
        self.monkeypatch.setattr(sys, "argv", ["unetrkit", *map(str, words)])
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        printed = self.capsys.readouterr()
        return Outcome(int(stop.value.code or 0), printed.out, printed.err)
