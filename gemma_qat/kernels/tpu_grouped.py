"""Rows times the packed matrices of their experts on TPU: only experts that have rows are read, each once.

The grid walks blocks of outputs and, for each, the experts that have rows, in order. Which they are is data, so there
are as many steps as there may be; those left over stay at the last expert, whose words are there already, and do
nothing. A step multiplies all rows, which costs what a few do, and keeps the expert's own.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, Int8, Int32

from gemma_qat.kernels.problem import first_of
from gemma_qat.kernels.tpu_blocks import operands, parameters
from gemma_qat.kernels.tpu_decode import LANES, Lying, for_outputs, product
from gemma_qat.numerics import PackedArray

NAME = "packed_grouped_products"
"""What the kernel is called in a compiled program."""


def grouped_matmul(
    x: Float[Array, "C R"],
    packed: PackedArray,
    group_sizes: Int[Array, "E"],
    *,
    interpret: bool = False,
) -> Float[Array, "C O"]:
    """Returns each row times the packed matrix of its expert, float32; rows sorted by expert.

    Rows past the sum of `group_sizes` give zeros.
    """
    return _products(x, packed, group_sizes, interpret)


def integer_grouped_matmul(
    codes: Int8[Array, "C R"],
    packed: PackedArray,
    group_sizes: Int[Array, "E"],
    *,
    interpret: bool = False,
) -> Int32[Array, "C O"]:
    """Returns the sums of products of each row's codes with those of its expert, exact; zeros past the last."""
    return _products(codes, packed, group_sizes, interpret)


def _products(
    x: jax.Array, packed: PackedArray, group_sizes: jax.Array, interpret: bool
) -> jax.Array:
    steps = min(x.shape[0], group_sizes.shape[0])
    chosen = chosen_experts(group_sizes, steps).at[0].add(first_of(packed))
    given = operands(x, packed, chosen=chosen[0])
    out = (given.rows, given.block)
    sums = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    return pl.pallas_call(
        functools.partial(_kernel, given.lying),
        name=NAME,
        out_shape=jax.ShapeDtypeStruct((given.rows, given.outputs), sums),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(given.blocks, steps),
            in_specs=given.specs(
                lambda block, step, chosen: (chosen[0, step], block),
                lambda block, step, chosen: (step, block),
            ),
            out_specs=pl.BlockSpec(out, lambda block, step, chosen: (0, block)),
        ),
        compiler_params=parameters(given.memory, "parallel", "arbitrary"),
        cost_estimate=given.cost(steps),
        interpret=interpret,
    )(chosen, *given.arrays)


def chosen_experts(group_sizes: jax.Array, steps: int) -> jax.Array:
    """Returns [3, steps]: experts that have rows, in order, the first row of each and the one after its last.

    Steps past them repeat the last such expert and have no rows.
    """
    ends = jnp.cumsum(group_sizes.astype(jnp.int32))
    some = group_sizes > 0
    (expert,) = jnp.nonzero(some, size=steps, fill_value=0)
    here = jnp.arange(steps) < jnp.sum(some)
    last = jnp.max(jnp.where(some, jnp.arange(some.shape[0]), 0))
    expert = jnp.where(here, expert, last).astype(jnp.int32)
    end = ends[expert]
    start = jnp.where(here, end - group_sizes[expert].astype(jnp.int32), end)
    return jnp.stack([expert, start, end])


def _kernel(lying: Lying, chosen: Any, x: Any, words: Any, *others: Any) -> None:
    *scale, out = others
    step = pl.program_id(1)
    start, end = chosen[1, step], chosen[2, step]

    @pl.when(step == 0)
    def _first() -> None:
        out[...] = jnp.zeros_like(out)

    @pl.when(start < end)
    def _add() -> None:
        row = jax.lax.broadcasted_iota(jnp.int32, (x.shape[1], LANES), 0)
        mine = (row >= start) & (row < end)

        def some(first: Any) -> None:
            own = pl.ds(first, LANES)
            made = product(lying, x, words, scale[0] if scale else None, first)
            out[:, own] = jnp.where(mine, made, out[:, own])

        for_outputs(out.shape[1], x.shape[0] * x.shape[2], some)
