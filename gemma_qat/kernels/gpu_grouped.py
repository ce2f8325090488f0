"""Rows times the packed matrices of their experts on GPU: only experts that are chosen are read (Pallas, Triton).

Rows are sorted by expert. A *visit* is some neighbouring rows of one expert; there are at most as many visits as rows,
and a program makes some outputs of one visit. Programs without a visit do nothing, and rows past the sum of
`group_sizes` belong to none: theirs is whatever was in memory.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int, Int8, Int32

from gemma_qat.kernels.gpu_block import Block, laid_out, launch
from gemma_qat.kernels.gpu_matmul import block_of, within_reach
from gemma_qat.kernels.gpu_tiling import visit_rows
from gemma_qat.kernels.problem import Problem, first_of, flat, problem_of
from gemma_qat.numerics import PackedArray

NAME = "gpu_packed_grouped_matmul"
"""What the kernel is called in a compiled program."""


def grouped_matmul(
    x: Float[Array, "C R"], packed: PackedArray, group_sizes: Int[Array, "E"]
) -> Float[Array, "C O"]:
    """Returns each row times the packed matrix of its expert, float32; rows sorted by expert."""
    return _grouped(x, packed, group_sizes)


def integer_grouped_matmul(
    codes: Int8[Array, "C R"], packed: PackedArray, group_sizes: Int[Array, "E"]
) -> Int32[Array, "C O"]:
    """Returns the sums of products of each row's codes with those of its expert, exact."""
    return _grouped(codes, packed, group_sizes)


def _grouped(x: jax.Array, packed: PackedArray, group_sizes: jax.Array) -> jax.Array:
    problem, packed = problem_of(x, packed), within_reach(packed)
    return _product(x, *flat(packed), first_of(packed), group_sizes, problem=problem)


def visits(group_sizes: Int[Array, "E"], rows: int, most: int) -> Int32[Array, "3 C"]:
    """Returns (expert, first row, rows) of each visit to an expert, `most` rows a visit at most; no rows: no visit."""
    ends = jnp.cumsum(group_sizes.astype(jnp.int32))
    place = jnp.arange(rows, dtype=jnp.int32)
    expert = jnp.searchsorted(ends, place, side="right").astype(jnp.int32)
    own = jnp.minimum(expert, ends.shape[0] - 1)
    begins = (place < ends[-1]) & ((place - (ends - group_sizes)[own]) % most == 0)
    (first,) = jnp.nonzero(begins, size=rows, fill_value=0)
    exists = place < jnp.sum(begins, dtype=jnp.int32)
    count = jnp.where(exists, jnp.minimum(ends[own[first]] - first, most), 0)
    return jnp.stack([own[first], first.astype(jnp.int32), count.astype(jnp.int32)])


@functools.partial(jax.jit, static_argnames="problem")
def _product(
    x: jax.Array,
    words: jax.Array,
    scale: jax.Array,
    place: jax.Array,
    group_sizes: jax.Array,
    problem: Problem,
) -> jax.Array:
    most = visit_rows(problem)
    block = block_of(problem, words, scale, rows=most, may_split=False)
    # A visit may reach past its last row, and past the last of all: there is something to read there too.
    reach = problem.rows + block.tiling.rows - 1
    return launch(
        functools.partial(_kernel, block),
        visits(group_sizes, problem.rows, most).at[0].add(place), laid_out(x, block, reach), words, scale,
        name=NAME, tiling=block.tiling,
        out_shape=jax.ShapeDtypeStruct((reach, problem.outputs), block.sum_dtype),
        grid=(pl.cdiv(problem.outputs, block.tiling.outputs), problem.rows),
    )[: problem.rows]  # fmt: skip


def _kernel(
    block: Block, visits_ref: Any, x_ref: Any, words_ref: Any, scale_ref: Any, out_ref: Any
) -> None:
    visit = pl.program_id(1)
    expert, start, count = (visits_ref[part, visit] for part in range(3))
    first = pl.program_id(0) * block.tiling.outputs

    @pl.when(count > 0)
    def _visit() -> None:
        sums = block.sums(x_ref, (words_ref, scale_ref), (expert,), first, row=start)
        for row, part in block.by_rows(sums):
            place = out_ref.at[
                pl.ds(start + row.start, row.size), pl.ds(first, block.tiling.outputs)
            ]
            ours = (row.start + jnp.arange(row.size) < count)[:, None]
            plgpu.store(place, part, mask=ours & block.inside(first)[None, :])
