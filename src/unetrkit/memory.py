"""What the C library does with freed memory: a network on a CPU gets back the same pages at every layer."""

from __future__ import annotations

import ctypes
import sys

# of glibc's malloc.h
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def keep_freed_memory(keep: bool = True) -> bool:
    """Large blocks that are freed stay with the process, to be used again; False where libc cannot be asked.

    Every layer of a network makes maps of up to hundreds of megabytes and frees them again. By default glibc
    gives such blocks back to the system, which clears each page again at its next use: a third of the time of
    a forward pass of Swin UNETR on a CPU (LOG.md). The process then keeps its largest size until it ends.
    `keep=False` is glibc's own way.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # a libc without it, musl for one
        return False
    default = 128 * 1024
    settings = {
        M_MMAP_MAX: 0 if keep else 65536,
        M_TRIM_THRESHOLD: 2**31 - 1 if keep else default,
        M_TOP_PAD: 2**28 if keep else default,
    }
    return all(mallopt(name, value) == 1 for name, value in settings.items())
