"""A test that needs two processes, as torchrun would start them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run_two(*program: object, timeout: float = 200) -> list[str]:
    """What two processes of a Python program printed, its last word being 0 and 1; both must end well."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]  # the program imports this file too
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    processes = [
        subprocess.Popen(
            [sys.executable, *map(str, program), rank],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for rank in "01"
    ]
    try:
        said = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    return said
