"""The largest logits of a packed head on GPU (Pallas, Triton).

For the single largest, a program keeps only the largest of its own outputs and its id: no logits are written, and what
is left to compare is one number a program. For more than one, logits are written (4 bytes for each row of words, some
hundredths of what is read) and XLA picks from them.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from gemma_qat.kernels.gpu_block import Block, laid_out, launch
from gemma_qat.kernels.gpu_matmul import block_of, matmul
from gemma_qat.kernels.problem import Problem, as_rows, flat, problem_of
from gemma_qat.kernels.reference import capped
from gemma_qat.numerics import PackedArray

NAME = "gpu_packed_top"
"""What the kernel is called in a compiled program."""


def top(
    x: Float[Array, "... D"], packed: PackedArray, k: int, cap: float | None
) -> tuple[Float[Array, "... k"], Int[Array, "... k"]]:
    """Returns the k largest soft-capped logits and their ids, the lower id first where two are equal."""
    if k > 1:
        values, ids = jax.lax.top_k(capped(matmul("", x, packed), cap), k)
        return values, ids
    rows, _ = as_rows(x, packed)
    value, number = _largest(rows, *flat(packed), problem=problem_of(x, packed), cap=cap)
    shape = (*x.shape[:-1], 1)
    return value.reshape(shape), number.reshape(shape)


@functools.partial(jax.jit, static_argnames=("problem", "cap"))
def _largest(
    x: jax.Array, words: jax.Array, scale: jax.Array, problem: Problem, cap: float | None
) -> tuple[jax.Array, jax.Array]:
    block = block_of(problem, words, scale, rows=problem.rows, may_split=False)
    rows = block.tiling.rows
    blocks = pl.cdiv(problem.outputs, block.tiling.outputs)
    values, ids = launch(
        functools.partial(_kernel, block, cap),
        laid_out(x, block, rows), words, scale,
        name=NAME, tiling=block.tiling, grid=(blocks, 1),
        out_shape=(
            jax.ShapeDtypeStruct((blocks, rows), jnp.float32),
            jax.ShapeDtypeStruct((blocks, rows), jnp.int32),
        ),
    )  # fmt: skip
    # Ids rise from block to block, and the first of equal ones is taken: the lower id, as within a block.
    best = jnp.argmax(values, axis=0)[None, :]
    found = (jnp.take_along_axis(part, best, axis=0)[0, : problem.rows] for part in (values, ids))
    return next(found), next(found)


def _kernel(
    block: Block, cap: float | None, x_ref: Any, words_ref: Any, scale_ref: Any, values_ref: Any,
    ids_ref: Any,
) -> None:  # fmt: skip
    own, table = pl.program_id(0), pl.program_id(1)  # of one table
    first = own * block.tiling.outputs
    sums = block.sums(x_ref, (words_ref, scale_ref), (table,), first)
    for row, part in block.by_rows(sums):
        inside = jnp.broadcast_to(block.inside(first)[None, :], part.shape)
        logits = jnp.where(inside, capped(part, cap), -jnp.inf)
        values_ref[own, row] = jnp.max(logits, axis=1)
        ids_ref[own, row] = first + jax.lax.argmax(logits, 1, jnp.int32)
