"""Keys and values: what attention looks at, and the ring they are kept in while decoding.

`KeyValues` is what one attention reads: keys after norm and rotation, values after their norm, and for every slot the
position and segment of the token in it (segment 0: nothing there). The mask follows from positions and segments alone,
so left padding, packed rows, and a ring buffer that has wrapped around need no cases of their own.

A sliding layer's cache has `window` slots and a token at position p sits in slot p mod window: writing position p
overwrites p - window, the first one p may no longer see. A global layer's cache has one slot per position.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyValues:
    """Keys and values with the positions and segments of their tokens.

    Shapes: keys and values [B, S, K, H]; positions and segments int32 [B, S]; segment 0 marks an empty slot.
    """

    # Untyped on purpose: transforms rebuild pytrees around tracers, shapes and placeholders.
    keys: Any
    values: Any
    positions: Any
    segments: Any

    @classmethod
    def empty(cls, batch: int, slots: int, heads: int, width: int, dtype: str) -> KeyValues:
        """Returns a cache with nothing in it."""
        return cls(
            keys=jnp.zeros((batch, slots, heads, width), dtype),
            values=jnp.zeros((batch, slots, heads, width), dtype),
            positions=jnp.zeros((batch, slots), jnp.int32),
            segments=jnp.zeros((batch, slots), jnp.int32),
        )

    def write(self, other: KeyValues) -> KeyValues:
        """Returns this cache with the tokens of `other` in their slots (position mod slots).

        Padding is dropped, and of several tokens for one slot only the last position's is written.
        """
        slots = self.positions.shape[1]
        valid = other.segments > 0
        last = jnp.max(jnp.where(valid, other.positions, -1), axis=1, keepdims=True)
        keep = valid & (other.positions > last - slots)
        index = jnp.where(keep, other.positions % slots, slots)  # slot number `slots` is dropped
        rows = jnp.arange(self.positions.shape[0])[:, None]

        def put(old: jax.Array, new: jax.Array) -> jax.Array:
            return old.at[rows, index].set(new.astype(old.dtype), mode="drop")

        return jax.tree.map(put, self, other)

    def followed_by(self, other: KeyValues) -> KeyValues:
        """Returns both as one, `other` after this."""
        return jax.tree.map(
            lambda a, b: jnp.concatenate([a, b.astype(a.dtype)], axis=1), self, other
        )


def visible(
    positions: Int[Array, "B T"], segments: Int[Array, "B T"], kv: KeyValues, window: int | None
) -> Array:
    """Returns bool [B, T, S]: which slots each query may look at.

    A query at position i sees a key at position j of its own segment when j <= i and, on sliding layers, i - j
    < window.
    """
    ahead = positions[:, :, None] - kv.positions[:, None, :]
    see = (
        (ahead >= 0)
        & (segments[:, :, None] == kv.segments[:, None, :])
        & (kv.segments > 0)[:, None, :]
    )
    return see if window is None else see & (ahead < window)
