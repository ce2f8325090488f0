"""Products of a few rows with a packed weight on TPU: each word is read once and decoded where it is multiplied."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int8, Int32

from gemma_qat.kernels.problem import as_rows, first_of
from gemma_qat.kernels.tpu_blocks import operands, parameters
from gemma_qat.kernels.tpu_decode import LANES, Lying, for_outputs, product
from gemma_qat.numerics import PackedArray

NAME = "packed_products"
"""What the kernel is called in a compiled program."""


def matmul(
    equation: str, lhs: Float[Array, "..."], packed: PackedArray, *, interpret: bool = False
) -> Float[Array, "..."]:
    """Returns the activation's last axes contracted with the packed weight's reduced ones, float32."""
    del equation  # it says just that
    x, shape = as_rows(lhs, packed)
    return products(x, packed, interpret).reshape(shape)


def integer_matmul(
    equation: str, codes: Int8[Array, "..."], packed: PackedArray, *, interpret: bool = False
) -> Int32[Array, "..."]:
    """Returns the sums of products of codes, exact: int8 by int8 on the MXU (v5e, v5p and later; v4 has none)."""
    del equation
    x, shape = as_rows(codes, packed)
    return products(x, packed, interpret).reshape(shape)


def products(x: jax.Array, packed: PackedArray, interpret: bool) -> jax.Array:
    """Returns [M, O]: float32, or int32 for int8 rows."""
    given = operands(x, packed)
    dtype = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    return pl.pallas_call(
        functools.partial(_kernel, given.lying),
        name=NAME,
        out_shape=jax.ShapeDtypeStruct((given.rows, given.outputs), dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(given.blocks,),
            in_specs=given.specs(
                lambda block, place: (place[0], block), lambda block, place: (0, block)
            ),
            out_specs=pl.BlockSpec((given.rows, given.block), lambda block, place: (0, block)),
        ),
        compiler_params=parameters(given.memory, "parallel"),
        cost_estimate=given.cost(),
        interpret=interpret,
    )(first_of(packed)[None], *given.arrays)


def _kernel(lying: Lying, place: Any, x: Any, words: Any, *others: Any) -> None:
    del place  # which the blocks were found by
    *scale, out = others

    def some(first: Any) -> None:
        out[:, pl.ds(first, LANES)] = product(lying, x, words, scale[0] if scale else None, first)

    for_outputs(out.shape[1], x.shape[0] * x.shape[2], some)
