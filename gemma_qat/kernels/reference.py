"""The definition of packed decoding: unpack, dequantize, contract; and of attention. Pure jnp, on any device.

Faster backends must agree with this one. The weight is dequantized to float32 and cast to the activation's dtype, the
very numbers that fake quantization gave in training, and sums are float32; integer sums are exact.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int8, Int32

from gemma_qat.kernels.grouped import grouped_dot
from gemma_qat.numerics import PackedArray
from gemma_qat.numerics.cache_codes import Coded, layer_of

MASKED = -1e30
"""The score of what is not seen: finite, so that a row that sees nothing stays finite too."""


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


def attend(
    q: Float[Array, "B K G H"],
    keys: Coded,
    values: Coded,
    visible: Bool[Array, "B S"],
    layer: Any = None,
) -> Float[Array, "B K G H"]:
    """Returns the attention output of one token a row over a cache of codes, float32; see `attention`."""
    if layer is not None:
        keys, values = layer_of((keys, values), layer)
    return attention(q[:, None], keys, values, visible[:, None])[:, 0]


def attention(
    q_BTKGH: Float[Array, "B T K G H"], keys: Any, values: Any, mask_BTS: Bool[Array, "B T S"]
) -> Float[Array, "B T K G H"]:
    """Returns softmax(q . k) v over the slots that are seen, float32; where none is, something finite.

    Shapes: keys and values [B, S, K, H], or `Coded`: then codes are multiplied, and their scales applied to scores and
        to weights, so that no float copy of a cache is made.
    Exactness: softmax and sums float32; weights are rounded to the queries' dtype before they are multiplied.
    """
    key_operand, key_scale = _factors(keys, q_BTKGH.dtype)
    value_operand, value_scale = _factors(values, q_BTKGH.dtype)
    scores = jnp.einsum(
        "BTKGH,BSKH->BKGTS", q_BTKGH, key_operand, preferred_element_type=jnp.float32
    )
    scores = scores if key_scale is None else scores * key_scale
    scores = jnp.where(mask_BTS[:, None, None], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1)
    weights = weights if value_scale is None else weights * value_scale
    weights = weights.astype(q_BTKGH.dtype)
    return jnp.einsum(
        "BKGTS,BSKH->BTKGH", weights, value_operand, preferred_element_type=jnp.float32
    )


def _factors(kept: Any, dtype: Any) -> tuple[jax.Array, jax.Array | None]:
    """Keys or values as an operand of `dtype`, and what its products are to be multiplied with, [B, K, 1, 1, S]."""
    if not isinstance(kept, Coded):
        return kept.astype(dtype), None
    return kept.integers().astype(dtype), jnp.moveaxis(kept.scale, 1, 2)[:, :, None, None, :]
