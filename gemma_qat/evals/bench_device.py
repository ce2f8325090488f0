"""What a benchmark of decoding has to know of the device it runs on: its kind, its memory, a dtype to compare with."""

from __future__ import annotations

import os
from pathlib import Path

import jax

SHARE = 0.8
"""Of the memory that is free, what a benchmark fills: the rest is for activations and the programs' own."""


def platform() -> str:
    """Returns the platform that programs are lowered for, by the name that backends have: cpu, tpu, cuda."""
    name = jax.default_backend()
    return "cuda" if name == "gpu" else name


def plain_dtype() -> str:
    """Returns the dtype of weights that packed ones are compared with: float32 on CPU, bfloat16 elsewhere."""
    return "float32" if platform() == "cpu" else "bfloat16"


def free_memory() -> int:
    """Returns the bytes that the default device can still give: of host memory for CPU, by its own count elsewhere."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"]) - int(stats["bytes_in_use"])
    lines = Path("/proc/meminfo")
    if lines.exists():
        found = dict(line.split(":") for line in lines.read_text("utf-8").splitlines())
        return 1024 * int(found["MemAvailable"].split()[0])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def short_of(what: str, needed: int, memory: int) -> str:
    """Returns, in words, that something does not fit; '' where it does."""
    if needed <= SHARE * memory:
        return ""
    return (
        f"{what} would take {needed / 2**30:.2f} GiB of {SHARE * memory / 2**30:.2f}: not measured"
    )
