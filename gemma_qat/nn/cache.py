"""Keys and values: what attention looks at, and the ring they are kept in while decoding.

`KeyValues` is what one attention reads: keys after norm and rotation, values after their norm, and for every slot the
position and segment of the token in it (segment 0: nothing there). The mask follows from positions and segments alone,
so left padding, packed rows, and a ring buffer that has wrapped around need no cases of their own.

A sliding layer's cache has `window` slots and a token at position p sits in slot p mod window: writing position p
overwrites p - window, the first one p may no longer see. A global layer's cache has one slot per position.

Caches of equal layers lie stacked, and a layer's are seen through its number: a token is written where it belongs in
the stack, and attention reads the stack, so that a step moves one token and not a cache.

Keys and values are kept in float, or as codes (`numerics/cache_codes.py`); what is written is turned into
what is there.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from gemma_qat.numerics.cache_codes import BITS, Coded, encode, layer_of

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
        slot. Of several layers: all with a leading axis L, and `layer`, int32, says which one is meant.
    """

    # Untyped on purpose: transforms rebuild pytrees around tracers, shapes and placeholders.
    keys: Any
    values: Any
    positions: Any
    segments: Any
    layer: Any = None

    WRAPS: ClassVar[bool] = True
    """Whether writing a token may overwrite another that is still seen by tokens written with it."""

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

    def of_layer(self, layer: Any) -> KeyValues:
        """Returns a stack as what is of one layer in it, or, for None, as the arrays that there are."""
        return dataclasses.replace(self, layer=layer)

    def own(self) -> KeyValues:
        """Returns what is of one layer, without an axis of layers."""
        return self if self.layer is None else layer_of(self.of_layer(None), self.layer)

    def write(
        self, other: KeyValues, steps: Steps = (None, None), *, in_turn: bool = False
    ) -> KeyValues:
        """Returns this cache with the tokens of `other` (floats) in their slots (position mod slots).

        Padding is dropped, and of several tokens for one slot only the last position's is written. `steps` are the
        static scales of keys and of values, where they have some: a cache of codes keeps theirs. `in_turn`: there is
        one token a row and none is padding, and rows may be written one after the other.

        One token goes where it belongs in a stack; for several, what is of the layer is taken out and put back.
        """
        coded = dataclasses.replace(
            other,
            keys=_as(self.keys, other.keys, steps[0]),
            values=_as(self.values, other.values, steps[1]),
        )
        is_coded = isinstance(self.keys, Coded)
        if in_turn and is_coded:
            return _in_turn(self, coded)
        if self.layer is None or (other.positions.shape[1] == 1 and not is_coded):
            return _scattered(self, coded)
        return jax.tree.map(
            lambda stack, own: jax.lax.dynamic_update_index_in_dim(stack, own, self.layer, 0),
            self.of_layer(None), _scattered(self.own(), coded),
        ).of_layer(self.layer)  # fmt: skip

    def followed_by(self, other: KeyValues) -> KeyValues:
        """Returns both as one, `other` (floats) after this; floats."""
        own = self.own()
        plain = dataclasses.replace(own, keys=_floats(own.keys), values=_floats(own.values))
        return jax.tree.map(
            lambda a, b: jnp.concatenate([a, b.astype(a.dtype)], axis=1), plain, other
        )


def _scattered(cache: KeyValues, tokens: KeyValues) -> KeyValues:
    slots = cache.positions.shape[-1]
    valid = tokens.segments > 0
    last = jnp.max(jnp.where(valid, tokens.positions, -1), axis=1, keepdims=True)
    keep = valid & (tokens.positions > last - slots)
    index = jnp.where(keep, tokens.positions % slots, slots)  # slot number `slots` is dropped
    rows = jnp.arange(index.shape[0])[:, None]
    place = (rows, index) if cache.layer is None else (cache.layer, rows, index)

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[place].set(new.astype(old.dtype), mode="drop")

    return jax.tree.map(put, cache.of_layer(None), tokens).of_layer(cache.layer)


def _in_turn(cache: KeyValues, tokens: KeyValues) -> KeyValues:
    """Returns a cache with one token of each row in its slot, a row written after the other.

    For bytes: of a scatter of them the TPU compiler copies the stack, to have it in tiles that the kernel does not
    take, and of a loop over rows it does too.
    """
    rows, slots = cache.positions.shape[-2:]
    at = tokens.positions[:, 0] % slots
    lead = () if cache.layer is None else (cache.layer,)

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        new = new.astype(old.dtype)[(None,) * len(lead)]
        rest = (0,) * (old.ndim - len(lead) - 2)
        for row in range(rows):
            token = jax.lax.slice_in_dim(new, row, row + 1, axis=len(lead))
            old = jax.lax.dynamic_update_slice(old, token, (*lead, row, at[row], *rest))
        return old

    return jax.tree.map(put, cache.of_layer(None), tokens).of_layer(cache.layer)


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
