"""Freed memory stays with the process: a block that was used is used again without a page fault."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
from unetrkit.memory import keep_freed_memory
if not keep_freed_memory(sys.argv[1] == "keep"):
    sys.exit(3)
for _ in range(20):
    torch.ones(10_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(10_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True)
    if done.returncode == 3:
        pytest.skip("this libc cannot be asked")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_kept_memory_is_used_again_without_page_faults() -> None:
    # 400 MB in pages of 4 KB are 97,656; in huge pages 200
    assert faults("keep") < 100 < faults("give back")
