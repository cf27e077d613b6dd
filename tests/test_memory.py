"""Freed memory stays with the process: a block that was used is used again without a page fault."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from unetrkit.memory import was_too_small

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


@pytest.mark.parametrize(
    ("error", "too_small"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
            True,
        ),
        (RuntimeError("shape '[4]' is invalid for input of size 6"), False),
        (OSError("not enough memory"), False),
    ],
)
def test_memory_that_was_too_small_is_told_from_other_errors(error, too_small):
    assert was_too_small(error) == too_small


def test_the_real_error_of_main_memory_is_known():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert was_too_small(caught.value)


def test_peak_memory_is_what_was_used():
    # a new process begins with the peak of the one that started it, on Linux
    program = """
import numpy
from unetrkit.memory import peak_memory
more = peak_memory() + 300_000_000
numpy.ones(more, "uint8")
print(peak_memory() / more)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert 1 <= float(done.stdout) < 1.3
