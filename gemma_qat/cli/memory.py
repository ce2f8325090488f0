"""What the C library keeps of memory that was freed, in a process that weights nearly fill.

glibc keeps freed pieces of up to 32 MB for later, in an arena for each thread: reading and compiling left 0.9 GB beside
2.1 GB of weights (E2B, `experiments/decode_memory`). Elsewhere than with glibc these functions do nothing.

Source: mallopt(3) and malloc_trim(3) of the Linux manual.
"""

from __future__ import annotations

import ctypes
import gc
import sys

_MMAP_THRESHOLD, _ARENA_MAX = -3, -8


def keep_little() -> None:
    """From here on, pieces of 1 MiB and more go back when they are freed, and all threads share one arena."""
    library = _library()
    if library is not None:
        library.mallopt(_MMAP_THRESHOLD, 2**20)
        library.mallopt(_ARENA_MAX, 1)


def give_back() -> None:
    """Gives back what is free."""
    gc.collect()
    library = _library()
    if library is not None:
        library.malloc_trim(0)


def _library() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None
