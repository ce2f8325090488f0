"""How the kernels for GPU cut a contraction into programs: one small table, and every number in it a guess.

No GPU was at hand when it was written: the numbers are to be replaced by what a device measures, and nothing but speed
depends on them. What they follow from is the code that Triton 3.9 makes of the kernels for sm_90, read, not run:
instructions for each weight, registers (none spilled, but 24 bytes with 64 rows of float32), shared memory.

    sums by          rows    q4_0   int8    int2     instructions of the loop for each weight
    tensor cores     1..16    6.5    6.3     4.0
                     64       8.2    7.6     6.1
    arithmetic, x    1        5.9    6.2     4.7     the sums of float32, which tensor cores would round
      of float32     8       15.1   16.8    13.8
    arithmetic, x    1        8.1                    rounding a number alone to bfloat16 and back costs more than the
      of bfloat16    8       28                      unused rows of a tensor core, which rounds two at once

A program makes `outputs` rows of words and walks their bytes a chunk at a time. Triton's arrays have sides that are
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

MOST_BYTES = 2**31
"""Of words: places in them are counted in 32 bits, one for a sign."""

VECTOR_ROWS, DOT_ROWS = 8, 16
"""At most that ordinary arithmetic makes at a time, and at least that tensor cores do."""

PROGRAMS = 264
"""That keep a device busy: two for each of the 132 multiprocessors of an H100. With fewer a row of words is split."""

LEAST_CHUNK, MOST_SPLITS = 32, 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """Sizes for contractions of at most so many rows."""

    rows: int
    outputs: int
    codes: int
    """Of a chunk, at most."""
    warps: int
    stages: int


VECTOR = (
    # Fewer bytes than threads: then each thread loads the numbers of the activation it needs, without exchange.
    Row(rows=1, outputs=32, codes=128, warps=4, stages=2),
    Row(rows=VECTOR_ROWS, outputs=16, codes=128, warps=4, stages=2),
)
DOTS = (
    # One warp for each 16 outputs: with more, two would decode the same weights.
    Row(rows=DOT_ROWS, outputs=32, codes=256, warps=2, stages=3),
    # More outputs share what is read of the activation; what waits in shared memory stays below 68 KiB.
    Row(rows=MOST_ROWS, outputs=64, codes=128, warps=4, stages=3),
)
DOTS_FLOAT32 = (Row(rows=MOST_ROWS, outputs=32, codes=64, warps=4, stages=2),)
"""float32 has no tensor cores that do not round it: these dots are ordinary arithmetic, and bound by it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiling:
    """How a contraction is cut: `splits` programs for each `outputs` rows of words, each walks `steps` chunks."""

    dots: bool
    """Sums by tensor cores, or by ordinary arithmetic."""
    rows: int
    """Of the activation, multiplied at a time; for tensor cores a power of two, some of them unused."""
    outputs: int
    chunk: int
    """Bytes."""
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
    dots = problem.dtype != "float32" or rows > VECTOR_ROWS
    many = DOTS_FLOAT32 if problem.dtype == "float32" else DOTS
    row = next(row for row in (many if dots else VECTOR) if rows <= row.rows)
    chunk = _chunk(width, row.codes // problem.slots)
    steps = math.ceil(width / chunk)
    blocks = math.ceil(problem.outputs / row.outputs)
    splits = 1
    while may_split and blocks * splits < PROGRAMS and splits < MOST_SPLITS:
        splits *= 2
    splits = min(splits, steps)
    return Tiling(
        dots=dots, rows=max(DOT_ROWS, 2 ** math.ceil(math.log2(rows))) if dots else rows,
        outputs=row.outputs, chunk=chunk, steps=math.ceil(steps / splits), splits=splits,
        warps=row.warps, stages=row.stages,
    )  # fmt: skip


def _chunk(width: int, most: int) -> int:
    """Returns the longest chunk, a power of two, that wastes less than an eighth of the walk."""
    chunk = most
    while chunk > LEAST_CHUNK and 8 * math.ceil(width / chunk) * chunk >= 9 * width:
        chunk //= 2
    return chunk


def visit_rows(problem: Problem) -> int:
    """Returns how many rows of one expert share a read of its words.

    Tensor cores multiply so many anyway; with ordinary arithmetic more than there are cost their arithmetic.
    """
    if problem.dtype != "float32":
        return DOT_ROWS
    wanted = (rows for rows in (1, 2, 4) if problem.rows * 4 <= problem.experts * rows)
    return next(wanted, VECTOR_ROWS if problem.rows >= VECTOR_ROWS * problem.experts else 4)
