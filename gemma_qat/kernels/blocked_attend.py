"""Attention of one token a row over a cache of codes by plain XLA, some slots at a time, for CPU.

No float copy of a cache is ever held, and of one that is longer than what was written to it, what was is read.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from gemma_qat.kernels.cached import parts_seen, weights_of
from gemma_qat.kernels.reference import MASKED
from gemma_qat.numerics.cache_codes import Coded

SLOTS = 256
"""That are made floats at a time."""


def attend(
    q: Float[Array, "B K G H"],
    keys: Coded,
    values: Coded,
    visible: Bool[Array, "B S"],
    layer: Any = None,
) -> Float[Array, "B K G H"]:
    """Returns the attention output, float32; zeros for a row that sees nothing."""
    B, K, G, H = q.shape
    S = visible.shape[1]
    length = min(SLOTS, S)
    bounds = parts_seen(visible, length)

    def part(number: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        most, total, sums = carry
        # The last part begins earlier where it would reach past the end, and leaves out what was seen before.
        start = jnp.minimum(number * length, S - length)

        def own(coded: Coded) -> Coded:
            return jax.tree.map(lambda array: slots_of(array, start, length, layer), coded)

        key, value = own(keys), own(values)
        ours = (
            slots_of(visible, start, length)
            & (start + jnp.arange(length) >= number * length)[None, :]
        )
        scores = jnp.einsum(
            "BKGH,BSKH->BKGS", q, key.integers().astype(q.dtype),
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        scores *= jnp.moveaxis(key.scale, 1, 2)[:, :, None, :]
        weights, most, before = weights_of(scores, ours[:, None, None, :], most)
        total = total * before + jnp.sum(weights, axis=-1, keepdims=True)
        weights *= jnp.moveaxis(value.scale, 1, 2)[:, :, None, :]
        more = jnp.einsum(
            "BKGS,BSKH->BKGH", weights.astype(q.dtype), value.integers().astype(q.dtype),
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        return most, total, sums * before + more

    start = (
        jnp.full((B, K, G, 1), MASKED, jnp.float32), jnp.zeros((B, K, G, 1), jnp.float32),
        jnp.zeros((B, K, G, H), jnp.float32),
    )  # fmt: skip
    first, last = jnp.min(bounds[:, 0]), jnp.max(bounds[:, 1])
    _, total, sums = jax.lax.fori_loop(first, last + 1, part, start)
    return sums / jnp.where(total > 0, total, 1.0)


def slots_of(array: jax.Array, start: jax.Array, length: int, layer: Any = None) -> jax.Array:
    """Returns slots [B, length, ...] from `start` on: of [B, S, ...], or of a layer of [L, B, S, ...]."""
    if layer is None:
        return jax.lax.dynamic_slice_in_dim(array, start, length, axis=1)
    _, batch, _, *rest = array.shape
    first = (layer, 0, start, *(0 for _ in rest))
    return jax.lax.dynamic_slice(array, first, (1, batch, length, *rest))[0]
