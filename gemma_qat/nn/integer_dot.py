"""Dots of codes with packed weights: int32 sums by a kernel, then scales. No weight is unpacked.

    y = (codes_x . codes_w  as int32)  *  s_x  *  s_w          two float32 roundings, then the activation's dtype

`s_x` is each token's own scale, or the site's static one. Value and gradient are those of `quant/aqt.py` on the same
codes, value bit for bit. A plan with a static scale is trained by a float dot of the same rounded operands: from that,
sums of codes differ by the order of float32 sums, and where activations are bfloat16 by the rounding of operands to it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gemma_qat import kernels
from gemma_qat.kernels.gradient import with_gradient_of
from gemma_qat.numerics import PackedArray
from gemma_qat.quant import aqt
from gemma_qat.quant.activations import round_dynamic, static_codes
from gemma_qat.quant.plan import Activation

Rounded = tuple[jax.Array, jax.Array, jax.Array]
"""Values in the activation's dtype, codes int8, scales with size 1 along contracted axes."""


def rounded(
    x: Float[Array, "..."], axes: tuple[int, ...], how: Activation, *step: jax.Array
) -> Rounded:
    """Returns an activation's codes and scales over `axes`: the static scale's (`step`, not 0) or each token's own."""
    if step:
        return static_codes(x, step[0], how.highest)
    return round_dynamic(x, axes, how.highest)


def packed_dot(
    equation: str, lhs: Float[Array, "..."], packed: PackedArray, how: Activation, *step: jax.Array
) -> Float[Array, "..."]:
    """Returns the activation, rounded, contracted with a packed weight's reduced axes.

    Shapes: as `contract`; one scale per output channel. `step` [1]: the static scale, which has no gradient here.
    """
    free = lhs.ndim - len(packed.reduced)
    axes = tuple(range(free, lhs.ndim))

    def by_kernel(lhs: jax.Array, packed: PackedArray, *step: jax.Array) -> jax.Array:
        _, codes, scale = rounded(lhs, axes, how, *step)
        sums = kernels.integer_matmul(equation, codes, packed)
        outputs = sums.shape[free:]
        rows = scale.reshape(*scale.shape[:free], *(1,) * len(outputs))
        columns = packed.own_scale().astype(jnp.float32).reshape(*(1,) * free, *outputs)
        return (sums.astype(jnp.float32) * rows * columns).astype(lhs.dtype)

    def definition(lhs: jax.Array, packed: PackedArray, *step: jax.Array) -> jax.Array:
        q = packed.unpack()
        return aqt.integer_dot(*rounded(lhs, axes, how, *step), q.dequantize().astype(lhs.dtype), q)

    return with_gradient_of(definition, by_kernel)(lhs, packed, *step)


def packed_grouped_dot(
    lhs: Float[Array, "C R"],
    packed: PackedArray,
    group_sizes: Int[Array, "E"],
    how: Activation,
    *step: jax.Array,
) -> Float[Array, "C O"]:
    """Returns each row, rounded, times the packed matrix of its expert; rows sorted by expert."""

    def by_kernel(lhs: jax.Array, packed: PackedArray, sizes: jax.Array, *step: jax.Array):
        _, codes, scale = rounded(lhs, (1,), how, *step)
        sums = kernels.integer_grouped_matmul(codes, packed, sizes)
        columns = packed.own_scale().astype(jnp.float32)[..., 0]
        own = jnp.repeat(columns, sizes, axis=0, total_repeat_length=len(lhs))
        return (sums.astype(jnp.float32) * scale * own).astype(lhs.dtype)

    def definition(lhs: jax.Array, packed: PackedArray, sizes: jax.Array, *step: jax.Array):
        q = packed.unpack()
        value = q.dequantize().astype(lhs.dtype)
        return aqt.integer_grouped_dot(*rounded(lhs, (1,), how, *step), value, q, sizes)

    return with_gradient_of(definition, by_kernel)(lhs, packed, group_sizes, *step)
