"""Packed contractions on GPU: few rows times packed words (Pallas, Triton).

Each program reads its rows of words once and multiplies them with all rows of the activation. Where a weight has too
few outputs to keep a device busy, a row of words is split among programs, and their sums are added afterwards.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int8, Int32

from gemma_qat.kernels.gpu_block import Block, laid_out, launch
from gemma_qat.kernels.gpu_tiling import MOST_BYTES, tiling
from gemma_qat.kernels.problem import Problem, as_rows, first_of, flat, problem_of
from gemma_qat.numerics import PackedArray

NAME = "gpu_packed_matmul"
"""What the kernel is called in a compiled program."""


def matmul(equation: str, lhs: Float[Array, "..."], packed: PackedArray) -> Float[Array, "..."]:
    """Returns the activation's last axes contracted with the packed weight's reduced ones, float32."""
    del equation  # it says just that
    return _contracted(lhs, packed)


def integer_matmul(
    equation: str, codes: Int8[Array, "..."], packed: PackedArray
) -> Int32[Array, "..."]:
    """Returns the sums of products of codes, exact."""
    del equation
    return _contracted(codes, packed)


def _contracted(lhs: jax.Array, packed: PackedArray) -> jax.Array:
    x, shape = as_rows(lhs, packed)
    packed = within_reach(packed)
    place = first_of(packed)[None]
    return _product(x, *flat(packed), place, problem=problem_of(lhs, packed)).reshape(shape)


def within_reach(packed: PackedArray) -> PackedArray:
    """Returns a weight of a stack alone, copied, where places in the stack's words do not fit in 32 bits."""
    return packed.alone() if packed.words.size >= MOST_BYTES else packed


def block_of(
    problem: Problem, words: jax.Array, scale: jax.Array, *, rows: int, may_split: bool
) -> Block:
    """Returns the block of a program that multiplies `rows` of the activation at a time."""
    width = words.shape[-1]
    return Block(
        grid=problem.grid, dtype=problem.dtype, outputs=problem.outputs, width=width,
        tiles=scale.shape[-1],
        tiling=tiling(problem, width, rows=rows, may_split=may_split),
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames="problem")
def _product(
    x: jax.Array, words: jax.Array, scale: jax.Array, place: jax.Array, problem: Problem
) -> jax.Array:
    block = block_of(problem, words, scale, rows=problem.rows, may_split=True)
    cut = block.tiling
    parts = launch(
        functools.partial(_kernel, block),
        laid_out(x, block, cut.rows), words, scale, place,
        name=NAME, tiling=cut,
        out_shape=jax.ShapeDtypeStruct((cut.splits, cut.rows, problem.outputs), block.sum_dtype),
        grid=(pl.cdiv(problem.outputs, cut.outputs), cut.splits),
    )  # fmt: skip
    return jnp.sum(parts, axis=0, dtype=block.sum_dtype)[: problem.rows]


def _kernel(
    block: Block, x_ref: Any, words_ref: Any, scale_ref: Any, place_ref: Any, out_ref: Any
) -> None:
    cut = block.tiling
    split, first = pl.program_id(1), pl.program_id(0) * cut.outputs
    lead = (place_ref[0],)
    sums = block.sums(x_ref, (words_ref, scale_ref), lead, first, begin=split * cut.steps)
    for row, part in block.by_rows(sums):
        place = out_ref.at[split, row, pl.ds(first, cut.outputs)]
        inside = jnp.broadcast_to(block.inside(first)[None, :], part.shape)
        plgpu.store(place, part, mask=inside)
