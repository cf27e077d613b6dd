"""What every test may use."""

from __future__ import annotations

from pathlib import Path

import pytest

from command import CommandLine

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real scans beside the checkout; the tests that want them are skipped where there are none."""
    if not SHARED.is_dir():
        pytest.skip("no real scans beside the checkout")
    return SHARED


@pytest.fixture
def unetrkit(monkeypatch, capsys) -> CommandLine:
    """The command line: `unetrkit("check", path)`."""
    return CommandLine(monkeypatch, capsys)
