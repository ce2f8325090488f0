"""Keys or values as a cache holds them in few bits: int8 codes, or two int4 codes a byte.

    scale  = extremum of a head's H numbers of one token / (2^(bits-1) - 1), or the site's static scale where it has one
    value  = code * scale

A site that rounds its keys and values on a static grid of these bits loses nothing here: its codes are what is kept.
Attention multiplies with codes and applies the scales to scores and weights, so no float copy of a cache is made.

    int4:   byte h = | code of element h + H/2 | code of element h |
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8

BITS = {"int8": 8, "int4": 4}
"""Caches of codes by name; any other name is a float dtype."""

_TINY = float(np.finfo(np.float32).tiny)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Coded:
    """Codes and scales.

    Shapes: codes int8 [B, S, K, H] or uint8 [B, S, K, H/2]; scale float32 [B, S, K]; of several layers [L, ...].
    """

    # Untyped on purpose: transforms rebuild pytrees around tracers, shapes and placeholders.
    codes: Any
    scale: Any
    bits: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def empty(cls, shape: tuple[int, ...], bits: int) -> Coded:
        """Returns codes of nothing for numbers of `shape` [B, S, K, H]."""
        *lead, width = shape
        stored = (width, jnp.int8) if bits == 8 else (width // 2, jnp.uint8)
        codes = jnp.zeros((*lead, stored[0]), stored[1])
        return cls(codes=codes, scale=jnp.zeros(lead, jnp.float32), bits=bits)

    def integers(self) -> Int8[Array, "B S K H"]:
        """Returns the codes, one an element."""
        if self.bits == 8:
            return self.codes
        return jnp.concatenate(halves(jax.lax.bitcast_convert_type(self.codes, jnp.int8)), axis=-1)

    def dequantize(self) -> Float[Array, "B S K H"]:
        """Returns the values, float32."""
        return self.integers().astype(jnp.float32) * self.scale[..., None]


def halves(signed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the low and the high half of bytes, both with their signs; `signed`: the bytes as numbers from -128 on.

    By arithmetic shifts, in whatever signed integers the bytes are: bytes, or registers' 32 bits.
    """
    above = 8 * signed.dtype.itemsize - 4
    return jnp.right_shift(jnp.left_shift(signed, above), above), jnp.right_shift(signed, 4)


def layer_of(stack: Any, layer: jax.Array | int) -> Any:
    """Returns the arrays of one layer, of arrays that have a leading axis of layers."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), stack)


def encode(x: Float[Array, "B T K H"], bits: int, step: Float[Array, "1"] | None = None) -> Coded:
    """Returns `x` as codes; `step` is a static scale to take instead of each head's own, 0 for none."""
    wide = x.astype(jnp.float32)
    highest = 2 ** (bits - 1) - 1
    scale = jnp.max(jnp.abs(wide), axis=-1) * np.float32(1 / highest)
    if step is not None:
        given = step.astype(jnp.float32)[:, None, None]
        scale = jnp.where(given == 0, scale, given)
    safe = jnp.where(scale < _TINY, 1.0, scale)
    codes = jnp.round(wide * (1.0 / safe)[..., None])
    codes = jnp.clip(codes, -highest - 1, highest).astype(jnp.int8)
    if bits == 4:
        low, high = jnp.split(jax.lax.bitcast_convert_type(codes, jnp.uint8), 2, axis=-1)
        codes = (low & jnp.uint8(15)) | (high << jnp.uint8(4))
    return Coded(codes=codes, scale=safe, bits=bits)
