"""Keys and values: what attention looks at, and the ring they are kept in while decoding.

`KeyValues` is what one attention reads: keys after norm and rotation, values after their norm, and for every slot the
position and segment of the token in it (segment 0: nothing there). The mask follows from positions and segments alone,
so left padding, packed rows, and a ring buffer that has wrapped around need no cases of their own.

A sliding layer's cache has `window` slots and a token at position p sits in slot p mod window: writing position p
overwrites p - window, the first one p may no longer see. A global layer's cache has one slot per position.

Keys and values are kept in float, or as codes (`numerics/cache_codes.py`); what is written is turned into
what is there.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from gemma_qat.numerics.cache_codes import BITS, Coded, encode

CODE_SLOTS = 32
"""A cache of codes has a multiple of so many slots, unless its window has not: others a TPU lays in ways of its own."""

Steps = tuple[jax.Array | None, jax.Array | None]
"""Static scales [1] of keys and of values."""


def slots_for(length: int, window: int | None, kind: str) -> int:
    """Returns the slots of a layer's cache of some kind for sequences of up to `length` tokens."""
    if kind in BITS:
        length = -(-length // CODE_SLOTS) * CODE_SLOTS
    return length if window is None else min(window, length)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyValues:
    """Keys and values with the positions and segments of their tokens.

    Shapes: keys and values [B, S, K, H], or `Coded`; positions and segments int32 [B, S]; segment 0 marks an empty
        slot.
    """

    # Untyped on purpose: transforms rebuild pytrees around tracers, shapes and placeholders.
    keys: Any
    values: Any
    positions: Any
    segments: Any

    @classmethod
    def empty(cls, batch: int, slots: int, heads: int, width: int, kind: str) -> KeyValues:
        """Returns a cache with nothing in it, of a float dtype, int8 or int4."""
        shape, bits = (batch, slots, heads, width), BITS.get(kind)
        keys, values = (
            jnp.zeros(shape, kind) if bits is None else Coded.empty(shape, bits) for _ in range(2)
        )
        return cls(
            keys=keys,
            values=values,
            positions=jnp.zeros((batch, slots), jnp.int32),
            segments=jnp.zeros((batch, slots), jnp.int32),
        )

    def write(self, other: KeyValues, steps: Steps = (None, None)) -> KeyValues:
        """Returns this cache with the tokens of `other` (floats) in their slots (position mod slots).

        Padding is dropped, and of several tokens for one slot only the last position's is written. `steps` are the
        static scales of keys and of values, where they have some: a cache of codes keeps theirs.
        """
        slots = self.positions.shape[1]
        valid = other.segments > 0
        last = jnp.max(jnp.where(valid, other.positions, -1), axis=1, keepdims=True)
        keep = valid & (other.positions > last - slots)
        index = jnp.where(keep, other.positions % slots, slots)  # slot number `slots` is dropped
        rows = jnp.arange(self.positions.shape[0])[:, None]

        def put(old: jax.Array, new: jax.Array) -> jax.Array:
            return old.at[rows, index].set(new.astype(old.dtype), mode="drop")

        coded = dataclasses.replace(
            other,
            keys=_as(self.keys, other.keys, steps[0]),
            values=_as(self.values, other.values, steps[1]),
        )
        return jax.tree.map(put, self, coded)

    def followed_by(self, other: KeyValues) -> KeyValues:
        """Returns both as one, `other` (floats) after this; floats."""
        plain = dataclasses.replace(self, keys=_floats(self.keys), values=_floats(self.values))
        return jax.tree.map(
            lambda a, b: jnp.concatenate([a, b.astype(a.dtype)], axis=1), plain, other
        )


def _as(there: Any, new: jax.Array, step: jax.Array | None) -> Any:
    return encode(new, there.bits, step) if isinstance(there, Coded) else new


def _floats(kept: Any) -> jax.Array:
    return kept.dequantize() if isinstance(kept, Coded) else kept


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
