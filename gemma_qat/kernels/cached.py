"""Attention of one token a row over a cache of codes, as every backend sees it.

    q [B, K, G, H]      codes int8 [B, S, K, H] or two int4 a byte [B, S, K, H/2]      scale float32 [B, S, K]

or codes and scales of several layers, [L, ...], and the number of the one that is meant.

    score[b, k, g, s]  = q . code of a key * its scale         where slot s is visible
    out[b, k, g]       = sum over s of  softmax(score)[s] * scale of a value * its code

A cache is read in parts of some slots, and softmax is made as they come: what was summed so far counts relative to the
largest score so far, and is made smaller when a larger one comes (Milakov and Gimelshein 2018, arXiv 1805.02867). A
cache that is longer than what was written to it is read from the first part that has a visible slot to the last.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from gemma_qat.kernels.reference import MASKED
from gemma_qat.numerics.cache_codes import Coded, halves


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cached:
    """The shape of such an attention, which is what a backend is chosen by."""

    batch: int
    heads: int
    """K, of keys and values."""
    group: int
    """G, query heads of one of them."""
    slots: int
    width: int
    """H."""
    bits: int
    dtype: str
    """Of queries."""

    @property
    def devices(self) -> int:
        """How many devices hold the arrays: whoever has several calls on each by itself."""
        return 1

    @property
    def row(self) -> int:
        """Bytes of a head's codes."""
        return self.width * self.bits // 8


def cached_of(q: jax.Array, keys: Coded) -> Cached:
    """Returns the problem of queries [B, K, G, H] over a cache."""
    batch, heads, group, width = q.shape
    return Cached(
        batch=batch, heads=heads, group=group, slots=keys.scale.shape[-2], width=width,
        bits=keys.bits, dtype=q.dtype.name,
    )  # fmt: skip


def parts_seen(visible: Bool[Array, "B S"], part: int) -> Int32[Array, "B 2"]:
    """Returns the first and the last part of `part` slots in which a row sees anything; 0 and -1 where it sees none."""
    count = -(-visible.shape[1] // part)
    slots = jnp.arange(visible.shape[1], dtype=jnp.int32)[None, :]
    first = jnp.min(jnp.where(visible, slots // part, count), axis=1)
    last = jnp.max(jnp.where(visible, slots // part, -1), axis=1)
    return jnp.stack([jnp.where(last < 0, 0, first), last], axis=1)


def numbers(signed: jax.Array, bits: int, dtype: str) -> tuple[jax.Array, ...]:
    """Returns the codes of bytes [..., row] as floats: all, or the first half of a head and the second.

    `signed`: the bytes as numbers from -128 on, int32: what registers have.
    """
    codes = (signed,) if bits == 8 else halves(signed)
    return tuple(code.astype(jnp.float32).astype(dtype) for code in codes)


def weights_of(
    scores: jax.Array, seen: jax.Array, most: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (a part's weights before they are divided by their sum, largest score, what earlier sums count for).

    Shapes: scores [..., slots], `seen` broadcast to them, largest scores [..., 1].
    """
    now = jnp.maximum(most, jnp.max(jnp.where(seen, scores, MASKED), axis=-1, keepdims=True))
    return jnp.where(seen, jnp.exp(scores - now), 0.0), now, jnp.exp(most - now)
