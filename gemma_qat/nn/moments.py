"""Second moments of what a weight is multiplied with: how much an error in each of its rows costs.

    y = x W,  an error d in W costs  E |x d|^2 = tr(d^T H d)  a token,  H = E[x x^T]

What is kept are sums over tokens, with how many there were, so that batches add up. Experts have one each, of the
tokens that chose them.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gemma_qat import kernels


def moments_of(
    x: Float[Array, "..."], axes: int, valid: Bool[Array, "..."], *, full: bool
) -> dict[str, jax.Array]:
    """Returns `sum` (float32 [R, R], or its diagonal [R] unless `full`) and `count` [] of the tokens counted.

    Shapes: x [tokens..., reduced...], the last `axes` of them reduced (R elements); `valid` [tokens...] or fewer axes.
    """
    size = math.prod(x.shape[x.ndim - axes :])
    tokens = x.shape[: x.ndim - axes]
    counted = jnp.broadcast_to(
        jnp.expand_dims(valid, tuple(range(valid.ndim, len(tokens)))), tokens
    )
    keep = counted.reshape(math.prod(tokens), 1)
    rows = jnp.where(keep, x.reshape(math.prod(tokens), size).astype(jnp.float32), 0.0)
    count = jnp.sum(keep, dtype=jnp.float32)
    if not full:
        return {"sum": jnp.sum(jnp.square(rows), axis=0), "count": count}
    product = jnp.einsum("CR,CS->RS", rows, rows, precision="highest")
    return {"sum": product, "count": count}


def grouped_moments_of(
    x: Float[Array, "C R"], valid: Bool[Array, "C"], group_sizes: Int[Array, "E"], *, full: bool
) -> dict[str, jax.Array]:
    """Returns `sum` (float32 [E, R, R], or diagonals [E, R]) and `count` [E] by expert.

    Shapes: rows sorted by expert, those past the sum of `group_sizes` belong to none.
    """
    experts, width = group_sizes.shape[0], x.shape[1]
    rows = jnp.where(valid[:, None], x.astype(jnp.float32), 0.0)
    ends = jnp.cumsum(group_sizes)
    owner = jnp.searchsorted(ends, jnp.arange(x.shape[0]), side="right")
    count = jax.ops.segment_sum(valid.astype(jnp.float32), owner, num_segments=experts)
    if not full:
        squares = jax.ops.segment_sum(jnp.square(rows), owner, num_segments=experts)
        return {"sum": squares, "count": count}
    # What the gradient of a grouped product sums by expert is what is wanted: each row times itself.
    rows = jnp.where((owner < experts)[:, None], rows, 0.0)
    weight = jnp.zeros((experts, width, width), jnp.float32)
    _, pull = jax.vjp(lambda w: kernels.grouped_dot(rows, w, group_sizes), weight)
    return {"sum": pull(rows)[0], "count": count}
