"""Packed contractions in plain XLA that never hold the unpacked weight: outputs are made a block at a time.

For processors without a kernel of their own. The definition unpacks whole weights, and XLA does not fuse that into the
product on CPU: a float weight stands in memory for every call. Here a loop unpacks `block` rows of words, multiplies
and lets them go. Sums are over all of R at once, as in the definition. It is for the few rows of a decode step: with
many, unpacking once for all of them is what pays.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8, Int32

from gemma_qat.kernels import reference
from gemma_qat.kernels.problem import as_rows, axes_of, first_of, flat
from gemma_qat.numerics import PackedArray

BLOCK_BYTES = 2**20
"""Of unpacked float32 weights at a time: what a core's second cache holds."""


def matmul(equation: str, lhs: Float[Array, "..."], packed: PackedArray) -> Float[Array, "..."]:
    """Returns the activation's last axes contracted with the packed weight's reduced ones, float32."""
    del equation  # it says just that
    x, shape = as_rows(lhs, packed)
    return _product(x, packed, first_of(packed)).reshape(shape)


def integer_matmul(
    equation: str, codes: Int8[Array, "..."], packed: PackedArray
) -> Int32[Array, "..."]:
    """Returns the sums of products of codes."""
    del equation
    x, shape = as_rows(codes, packed)
    return _product(x, packed, first_of(packed)).reshape(shape)


def grouped_matmul(
    x: Float[Array, "C R"], packed: PackedArray, group_sizes: Int[Array, "E"]
) -> Float[Array, "C O"]:
    """Returns each row times the packed matrix of its expert, float32: only experts that are chosen are read."""
    return _grouped(x, packed, group_sizes)


def integer_grouped_matmul(
    codes: Int8[Array, "C R"], packed: PackedArray, group_sizes: Int[Array, "E"]
) -> Int32[Array, "C O"]:
    """Returns the sums of products of each row's codes with those of its expert."""
    return _grouped(codes, packed, group_sizes)


def _grouped(x: jax.Array, packed: PackedArray, group_sizes: jax.Array) -> jax.Array:
    experts = jnp.repeat(
        jnp.arange(packed.shape[0]), group_sizes, axis=0, total_repeat_length=x.shape[0]
    )

    def one(row: tuple[jax.Array, jax.Array]) -> jax.Array:
        value, expert = row
        return _product(value[None], packed, first_of(packed) + expert)[0]

    return jax.lax.map(one, (x, experts))


def _product(x: jax.Array, packed: PackedArray, which: jax.Array) -> jax.Array:
    """Returns rows times one of the matrices of `flat`, [M, O]: float32, or int32 for int8 rows.

    Made from blocks of outputs, the last of which overlaps the one before.
    """
    integer = x.dtype == jnp.int8
    multiply = reference.integer_matmul if integer else reference.matmul
    words, scale = flat(packed)
    _, outputs, reduced = axes_of(packed)
    size = min(outputs, max(8, BLOCK_BYTES // (4 * reduced)))

    def body(number: jax.Array, out: jax.Array) -> jax.Array:
        start = jnp.minimum(number * size, outputs - size)

        def own(array: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice(array, (which, start, 0), (1, size, array.shape[2]))[0]

        block = PackedArray(
            words=own(words),
            scale=own(scale),
            grid=packed.grid,
            shape=(size, reduced),
            reduced=(1,),
        )
        made = multiply("MR,OR->MO", x, block)
        return jax.lax.dynamic_update_slice_in_dim(out, made, start, axis=1)

    sums = jnp.zeros((x.shape[0], outputs), jnp.int32 if integer else jnp.float32)
    return jax.lax.fori_loop(0, -(-outputs // size), body, sums)


def top(
    x: Float[Array, "... D"], packed: PackedArray, k: int, cap: float | None
) -> tuple[Float[Array, "... k"], Int[Array, "... k"]]:
    """Returns the k largest soft-capped logits and their ids; the head is unpacked a block at a time."""
    values, ids = jax.lax.top_k(reference.capped(matmul("", x, packed), cap), k)
    return values, ids
