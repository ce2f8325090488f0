"""What the TPU kernels of packed contractions share: 128 outputs of a block, decoded in registers and multiplied.

A block of words lies in the chip's memory as it lay outside, see `tpu_blocks`: outputs along sublanes and bytes along
lanes, or turned. It is taken a chunk at a time, 128 outputs by so many bytes as hold 4096 codes, which bounds how far
the compiler unrolls:

    words [128, bytes] -> int32 -> for each slot: shift, mask -> (code - half) * scale -> the activation's dtype -> MXU

These are the numbers the definition multiplies, bit for bit; only the order of a float32 sum is another. float32
activations are multiplied with all their bits (`Precision.HIGHEST`).

A scale has to reach the bytes of its tile. Where bytes lie along sublanes a row of scales is repeated. Where they lie
along lanes, 128 neighbouring scales of an output, one register, cover a chunk or more, and a gather along its lanes
(`tpu.dynamic_gather`, one for 128 bytes, exact) spreads them. The alternatives are dearer: a product with a matrix of
zeros and ones needs six passes of the MXU to be exact, and Mosaic does not merge the lanes of [outputs, tiles, bytes].

float16 is no type of a register. Scales of that type come in as the bits they are, so that two bytes a tile are read
and not the two, four and four of a cast outside, and `_from_float16` widens them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from gemma_qat.kernels.problem import codes_in, half
from gemma_qat.numerics import Grid

LANES = 128
"""Numbers in a row of a register, and the outputs that are made at a time."""

CHUNK = 4096
"""Codes of a row that are decoded at a time, at most."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lying:
    """How a packed weight lies in memory."""

    grid: Grid
    words_turned: bool
    """[W, O] and not [O, W]."""
    scale_turned: bool
    """[Q, O] and not [O, Q]."""

    @property
    def chunk(self) -> int:
        """Bytes of a chunk: 4096 codes, or as many as 128 scales cover."""
        tile = self.grid.tile
        codes = CHUNK if tile is None else min(CHUNK, LANES * tile)
        return codes * self.grid.number.bits // 8

    @property
    def tile_shift(self) -> int:
        """A tile has 2^shift bytes."""
        assert self.grid.tile is not None
        return (self.grid.tile * self.grid.number.bits // 8).bit_length() - 1


def product(lying: Lying, x: Any, words: Any, scale: Any, first: Any) -> jax.Array:
    """Returns [M, 128]: rows of activations times 128 outputs of a block, those from `first` on.

    Shapes: refs x [P, M, W] by slots, words uint8 and scale as they lie. With x int8 the codes themselves are
    multiplied, `scale` is None and the sums are int32; else they are float32.
    """
    _, rows, width = x.shape
    own = pl.ds(first, LANES)
    whole, rest = divmod(width, lying.chunk)

    def add(start: Any, length: int, total: jax.Array) -> jax.Array:
        part = pl.ds(start, length)
        block = words[part, own] if lying.words_turned else words[own, part]
        spread = None if scale is None else _spread(lying, scale, own, start, length)
        for slot in range(x.shape[0]):
            values = _values(lying.grid, block.astype(jnp.int32), slot, spread, x.dtype)
            total += _dot(x[slot, :, part], values, 0 if lying.words_turned else 1)
        return total

    total = jnp.zeros((rows, LANES), jnp.int32 if scale is None else jnp.float32)
    if whole > 1:

        def body(chunk: jax.Array, total: jax.Array) -> jax.Array:
            return add(pl.multiple_of(chunk * lying.chunk, LANES), lying.chunk, total)

        total = jax.lax.fori_loop(0, whole, body, total)
    elif whole:
        total = add(0, lying.chunk, total)
    return add(whole * lying.chunk, rest, total) if rest else total


def for_outputs(block: int, body: Callable[[Any], None]) -> None:
    """Calls `body` with the first of each 128 outputs of a block."""
    if block == LANES:
        body(0)
        return

    def step(number: jax.Array, carry: None) -> None:
        body(pl.multiple_of(number * LANES, LANES))

    jax.lax.fori_loop(0, block // LANES, step, None)


def _dot(x: jax.Array, values: jax.Array, axis: int) -> jax.Array:
    whole = x.dtype == jnp.float32
    return jax.lax.dot_general(
        x, values, (((1,), (axis,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if whole else jax.lax.Precision.DEFAULT,
        preferred_element_type=jnp.int32 if x.dtype == jnp.int8 else jnp.float32,
    )  # fmt: skip


def _values(grid: Grid, block: jax.Array, slot: int, spread: Any, dtype: Any) -> jax.Array:
    codes = codes_in(block, grid, slot)
    if spread is None:
        return codes.astype(jnp.int8)
    value = codes.astype(jnp.float32)
    if half(grid):
        value -= half(grid)
    return (value * spread).astype(dtype)


def _spread(lying: Lying, scale: Any, own: Any, start: Any, length: int) -> jax.Array:
    """Returns the scale of each byte, float32, laid as the words are."""
    if lying.grid.tile is None:  # one for an output: [1, outputs]
        row = _widened(scale[:, own])
        if lying.words_turned:
            return jnp.broadcast_to(row, (length, LANES))
        columns = [jnp.broadcast_to(row, (LANES, LANES)).T] * pl.cdiv(length, LANES)
        return jnp.concatenate(columns, axis=1)[:, :length]
    shift = lying.tile_shift
    if lying.words_turned:
        near = _widened(scale[pl.ds(start >> shift, length >> shift), own])
        each = jnp.broadcast_to(near[:, None], (length >> shift, 1 << shift, LANES))
        return each.reshape(length, LANES)
    first = _aligned(start >> shift)
    if lying.scale_turned:
        near = _widened(scale[pl.ds(first, LANES), own]).T
    else:
        near = _widened(scale[own, pl.ds(first, LANES)])
    byte = jax.lax.broadcasted_iota(jnp.int32, (LANES, LANES), 1) + (start - (first << shift))
    columns = [
        jnp.take_along_axis(near, (byte + at) >> shift, axis=1, mode="promise_in_bounds")
        for at in range(0, length, LANES)
    ]
    return jnp.concatenate(columns, axis=1)[:, :length]


def _aligned(tile: Any) -> Any:
    """Returns the first of the 128 tiles that one is among."""
    first = tile & -LANES
    return first if isinstance(first, int) else pl.multiple_of(first, LANES)


def _widened(scale: jax.Array) -> jax.Array:
    return _from_float16(scale) if scale.dtype == jnp.uint16 else scale.astype(jnp.float32)


def _from_float16(bits: jax.Array) -> jax.Array:
    """Returns the float32 of finite float16 numbers that are given as their bits; exact.

    Exponent and fraction are moved to where float32 has them, and 127 - 15 added for the other bias. Of a subnormal
    one, which has no such exponent, the fraction counts units of 2^-24.
    """
    wide = bits.astype(jnp.int32)
    low = wide & 0x7FFF
    normal = jax.lax.bitcast_convert_type((low << 13) + (112 << 23), jnp.float32)
    size = jnp.where(low < 0x400, low.astype(jnp.float32) * 2.0**-24, normal)
    return jnp.where(wide > 0x7FFF, -size, size)
