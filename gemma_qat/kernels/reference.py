"""The definition of packed decoding: unpack, dequantize, contract. Pure jnp, on any device.

Faster backends must agree with this one. The weight is dequantized to float32 and cast to the activation's dtype, the
very numbers that fake quantization gave in training, and the contraction is the same einsum.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gemma_qat.kernels.grouped import grouped_dot
from gemma_qat.numerics import PackedArray


def matmul(equation: str, lhs: Float[Array, "..."], rhs: PackedArray) -> Float[Array, "..."]:
    """Returns the einsum of an activation with a packed weight, in the activation's dtype."""
    weight = rhs.dequantize().astype(lhs.dtype)
    out = jnp.einsum(equation, lhs, weight, preferred_element_type=jnp.float32)
    return out.astype(lhs.dtype)


def grouped_matmul(
    lhs: Float[Array, "C R"], rhs: PackedArray, group_sizes: Int[Array, "E"]
) -> Float[Array, "C O"]:
    """Returns each row times the packed matrix of its expert; rows sorted by expert."""
    weight = rhs.dequantize().astype(lhs.dtype)
    return grouped_dot(lhs, weight, group_sizes).astype(lhs.dtype)
