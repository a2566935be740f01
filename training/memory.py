"""How a process of training keeps its memory."""

import ctypes
import os

# Parameters of `mallopt` in glibc's malloc.h, and their values here.
TRIM_THRESHOLD, MMAP_MAX = (-1, 2**31 - 1), (-4, 0)


def keep_freed_memory() -> None:
    """Keep the memory of freed tensors for the next ones, up to 2 GiB, where the C library is glibc.

    By default glibc returns large blocks to the operating system at once, which clears each page of a new one as it is
    first written to: with large networks on the CPU a fifth of the processor's time.
    """
    library = ctypes.CDLL(None) if os.name == "posix" else None
    if mallopt := getattr(library, "mallopt", None):
        for parameter, value in (TRIM_THRESHOLD, MMAP_MAX):
            mallopt(parameter, value)
