"""The definition of packed decoding: unpack, dequantize, contract. Pure jnp, on any device.

Faster backends must agree with this one. The weight is dequantized to float32 and cast to the activation's dtype, the
very numbers that fake quantization gave in training, and sums are float32; integer sums are exact.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8, Int32

from gemma_qat.kernels.grouped import grouped_dot
from gemma_qat.numerics import PackedArray


def matmul(equation: str, lhs: Float[Array, "..."], packed: PackedArray) -> Float[Array, "..."]:
    """Returns the einsum of an activation with a packed weight, float32."""
    weight = packed.dequantize().astype(lhs.dtype)
    return jnp.einsum(equation, lhs, weight, preferred_element_type=jnp.float32)


def integer_matmul(
    equation: str, codes: Int8[Array, "..."], packed: PackedArray
) -> Int32[Array, "..."]:
    """Returns the sums of products of codes; the scales, one for a row of each, are for the caller to multiply."""
    return jnp.einsum(equation, codes, packed.unpack().codes, preferred_element_type=jnp.int32)


def grouped_matmul(
    x: Float[Array, "C R"], packed: PackedArray, group_sizes: Int[Array, "E"]
) -> Float[Array, "C O"]:
    """Returns each row times the packed matrix of its expert, float32; rows sorted by expert."""
    return grouped_dot(x, packed.dequantize().astype(x.dtype), group_sizes)


def integer_grouped_matmul(
    codes: Int8[Array, "C R"], packed: PackedArray, group_sizes: Int[Array, "E"]
) -> Int32[Array, "C O"]:
    """Returns the sums of products of each row's codes with those of its expert; rows sorted by expert."""
    return jax.lax.ragged_dot(
        codes, packed.unpack().codes, group_sizes, preferred_element_type=jnp.int32
    )


def rows(packed: PackedArray, ids: Int[Array, "..."]) -> Float[Array, "... D"]:
    """Returns the rows `ids` of a packed table [V, ...] whose last axis is the reduced one, float32."""
    return packed.rows(ids).dequantize()


def top(
    x: Float[Array, "... D"], packed: PackedArray, k: int, cap: float | None
) -> tuple[Float[Array, "... k"], Int[Array, "... k"]]:
    """Returns the k largest soft-capped logits of the head and their ids, the lower id first where two are equal."""
    values, ids = jax.lax.top_k(capped(matmul("...D,VD->...V", x, packed), cap), k)
    return values, ids


def capped(logits: Float[Array, "..."], cap: float | None) -> Float[Array, "..."]:
    """Returns cap * tanh(logits / cap)."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)
