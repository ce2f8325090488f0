"""How the kernels for GPU cut a contraction into programs: one small table, and every number in it a guess.

No GPU was at hand when it was written. The sizes follow from counting registers and traffic, and are to be replaced by
what a device measures; nothing but speed depends on them.

A program makes `outputs` rows of words and walks their bytes `chunk` at a time. Triton's arrays have sides that are
powers of two, lengths of Gemma do not (1536, 2112, 2816, 3840, 5376): the last chunk may reach past the end of a row,
where nothing is read and zeros are multiplied. A chunk is as long as the table allows unless so much as an eighth of
the walk were such zeros.
"""

from __future__ import annotations

import dataclasses
import math

from gemma_qat.kernels.problem import Problem

MOST_ROWS = 64
"""Of a kernel: sums of more do not stay in registers."""

VECTOR_ROWS = 8
"""Up to so many rows products are made by ordinary arithmetic, one a row; above, by tensor cores."""

PROGRAMS = 264
"""That keep a device busy: two for each of the 132 multiprocessors of an H100. With fewer a row of words is split."""

LEAST_CHUNK, MOST_SPLITS = 32, 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """Sizes for contractions of at most so many rows."""

    rows: int
    outputs: int
    chunk: int
    """Bytes at most; 16 neighbouring ones are one load of a thread."""
    warps: int
    stages: int = 2


TABLE = (
    # Sums of the vector form stay spread over a chunk until the end: outputs * chunk * rows / (32 * warps) registers.
    Row(rows=1, outputs=16, chunk=256, warps=4),
    Row(rows=4, outputs=16, chunk=128, warps=4),
    Row(rows=VECTOR_ROWS, outputs=16, chunk=128, warps=8),
    # With tensor cores the activation is read again for each program: more outputs share it.
    Row(rows=16, outputs=32, chunk=128, warps=4),
    Row(rows=MOST_ROWS, outputs=64, chunk=64, warps=4),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiling:
    """How a contraction is cut: `splits` programs for each `outputs` rows of words, each walks `steps` chunks."""

    outputs: int
    chunk: int
    steps: int
    splits: int
    warps: int
    stages: int

    @property
    def walked(self) -> int:
        """Bytes of a row that all programs walk together, those past its end too."""
        return self.chunk * self.steps * self.splits


def tiling(problem: Problem, width: int, *, rows: int, may_split: bool) -> Tiling:
    """Returns how to cut rows of `width` bytes, `rows` of the activation at a time."""
    row = next(row for row in TABLE if rows <= row.rows)
    chunk = _chunk(width, row.chunk)
    steps = math.ceil(width / chunk)
    outputs = row.outputs
    while outputs > 16 and problem.outputs // outputs < PROGRAMS // 2:
        outputs //= 2
    blocks = math.ceil(problem.outputs / outputs) * max(problem.experts, 1)
    splits = 1
    while may_split and blocks * splits < PROGRAMS and splits < min(MOST_SPLITS, steps):
        splits *= 2
    splits = min(splits, steps)
    return Tiling(
        outputs=outputs, chunk=chunk, steps=math.ceil(steps / splits), splits=splits,
        warps=row.warps, stages=row.stages,
    )  # fmt: skip


def _chunk(width: int, most: int) -> int:
    """Returns the longest chunk, a power of two, that wastes less than an eighth of the walk."""
    chunk = most
    while chunk > LEAST_CHUNK and 8 * math.ceil(width / chunk) * chunk >= 9 * width:
        chunk //= 2
    return chunk


def visit_rows(problem: Problem) -> int:
    """Returns how many rows of one expert share a read of its words; more than there are costs their arithmetic."""
    for rows in (1, 2, 4):
        if problem.rows * 4 <= problem.experts * rows:
            return rows
    return VECTOR_ROWS if problem.rows >= VECTOR_ROWS * problem.experts else 4


def row_block(rows: int) -> int:
    """Returns the rows that tensor cores multiply for so many: a power of two, 16 at least."""
    return max(16, 2 ** math.ceil(math.log2(rows)))
