"""Memory: that it was too small, how much was needed, and what the C library does with what is freed."""

import ctypes
import re
import sys

# of glibc's malloc.h
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def was_too_small(error: BaseException) -> bool:
    """Whether it says that a GPU's memory or the computer's was too small."""
    import torch

    # torch's allocator of main memory has no exception of its own
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    words = "DefaultCPUAllocator|not enough memory|can't allocate memory"
    return known or (isinstance(error, RuntimeError) and bool(re.search(words, str(error))))


def peak_memory() -> int | None:
    """Bytes: the most that this process has had so far; None where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


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
