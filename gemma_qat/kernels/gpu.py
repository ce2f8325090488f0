"""The kernels for NVIDIA GPUs as a backend: what they are called by, and what they refuse.

Their results are tested interpreted, and that they lower for CUDA is tested too; what a device makes of them is not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gemma_qat.kernels import gpu_attend, gpu_grouped, gpu_matmul, gpu_top
from gemma_qat.kernels.gpu_tiling import MOST_BYTES, MOST_ROWS
from gemma_qat.kernels.problem import INTEGER, Problem

OPERATIONS: dict[str, Callable[..., Any]] = {
    "matmul": gpu_matmul.matmul,
    "integer_matmul": gpu_matmul.integer_matmul,
    "grouped_matmul": gpu_grouped.grouped_matmul,
    "integer_grouped_matmul": gpu_grouped.integer_grouped_matmul,
    "top": gpu_top.top,
    "attend": gpu_attend.attend,
}


def refuses(operation: str, problem: Problem) -> str | None:
    """Returns why the kernels do not take a problem; None when they do."""
    fmt, tile = problem.grid.number, problem.tile_bytes
    integer = operation in INTEGER
    expected = ("int8",) if integer else ("float32", "bfloat16")
    if problem.rows > MOST_ROWS:
        return f"{problem.rows} rows, at most {MOST_ROWS}: their sums are kept in registers"
    if not problem.slots:
        return f"{fmt.name}, tile {problem.grid.tile}: codes do not sit in whole bytes of a tile"
    if tile is not None and tile & (tile - 1):
        return f"a tile of {tile} bytes: Triton's blocks have sides that are powers of two"
    if problem.dtype not in expected:
        return f"activations of {problem.dtype}, one of {', '.join(expected)} expected"
    if integer and (tile is not None or fmt.zero):
        return f"{fmt.name}, tile {problem.grid.tile}: one scale a row and a zero of 0 expected"
    if max(problem.experts, 1) * problem.outputs * problem.reduced * fmt.bits // 8 >= MOST_BYTES:
        return "2 GiB of words or more: places are counted in 32 bits"
    return None
