"""What the TPU kernels of packed contractions share: 128 outputs of a block, decoded in registers and multiplied.

A block of words lies in the chip's memory as it lay outside, see `tpu_blocks`: outputs along sublanes and bytes along
lanes, or turned. It is taken a chunk at a time, 128 outputs by so many bytes as hold 4096 codes, which bounds how far
the compiler unrolls:

    words [bytes, 128] -> for each slot: (code - zero) float32 -> * scale -> the activation's dtype -> MXU

These are the numbers the definition multiplies, bit for bit; only the order of a float32 sum is another. float32
activations are multiplied with all their bits (`Precision.HIGHEST`).

What bounds a kernel is not the MXU but the operations on vectors before it, so a code is never shifted nor converted:
bits b .. of a byte, with the exponent of 2^(23 - b) put above them, are the float32 2^(23 - b) + code, and a constant
is to be subtracted anyway. All exponents are put there at once, and one mask leaves a slot's code with its own:

    byte | exponents = 10010110 .. hhhhllll,    & 10010110 .. 00001111 = 2^23 + l,    & 10010010 .. 11110000 = 2^19 + h

Codes that are multiplied as integers stay in bytes, four to a number of 32 bits.

A scale has to reach the bytes of its tile. With bytes along sublanes a row of scales is repeated, which costs next to
nothing, and words that lie the other way are turned first, as bytes. To spread scales along lanes is dearer: by the
compiler's own schedule for a v5e (bundles of 128 outputs by 4096 codes of q4_0, 8 rows) it took 1288 with a gather
along lanes, where turning takes 1036 and words that lie turned 922; a product with a matrix of zeros and ones needs
six passes of the MXU to be exact.

float16 is no type of a register nor of a kernel's argument. Scales of that type come in as the bits they are, so that
no more than two bytes a tile are moved, and `_from_float16` widens them.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from gemma_qat.kernels.problem import half
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
    def tile_bytes(self) -> int:
        """Bytes that share a scale."""
        assert self.grid.tile is not None
        return self.grid.tile * self.grid.number.bits // 8


def product(lying: Lying, x: Any, words: Any, scale: Any, first: Any) -> jax.Array:
    """Returns [M, 128]: rows of activations times 128 outputs of a block, those from `first` on.

    Shapes: refs x [P, M, W] by slots, words uint8 and scale as they lie. With x int8 the codes themselves are
    multiplied, `scale` is None and the sums are int32; else they are float32.
    """
    _, rows, width = x.shape
    own = pl.ds(first, LANES)
    whole, rest = divmod(width, lying.chunk)
    turn = not lying.words_turned and lying.grid.tile is not None
    upright = lying.words_turned or turn  # bytes along sublanes

    def add(number: Any, length: int, total: jax.Array) -> jax.Array:
        part = _part(number, lying.chunk, length)
        block = words[part, own] if lying.words_turned else words[own, part]
        block = block.T if turn else block
        if scale is None:
            slots = _integers(lying.grid, block)
        else:
            spread = _spread(lying, scale, own, number, block.shape, upright)
            slots = _values(lying.grid, block, spread, x.dtype)
        for slot, values in enumerate(slots):
            total += _dot(x[slot, :, part], values, 0 if upright else 1)
        return total

    total = jnp.zeros((rows, LANES), jnp.int32 if scale is None else jnp.float32)
    if whole > 1:
        total = jax.lax.fori_loop(0, whole, lambda i, total: add(i, lying.chunk, total), total)
    elif whole:
        total = add(0, lying.chunk, total)
    return add(whole, rest, total) if rest else total


def _part(number: Any, size: int, length: int) -> Any:
    """Returns the slice of `length` that starts `number` chunks of `size` in."""
    start = number * size
    return pl.ds(start if isinstance(number, int) else pl.multiple_of(start, size), length)


def for_outputs(block: int, codes: int, body: Callable[[Any], None]) -> None:
    """Calls `body` with the first of each 128 outputs of a block, of rows of so many codes.

    Where rows are short several times in a step, which the compiler then runs into one another.
    """
    count = block // LANES
    together = next(n for n in (4, 3, 2, 1) if count % n == 0 and (n * codes <= CHUNK or n == 1))

    def step(number: Any, carry: None) -> None:
        for own in range(together):
            body(pl.multiple_of((number * together + own) * LANES, LANES))

    jax.lax.fori_loop(0, count // together, step, None)


def _dot(x: jax.Array, values: jax.Array, axis: int) -> jax.Array:
    whole = x.dtype == jnp.float32
    return jax.lax.dot_general(
        x, values, (((1,), (axis,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if whole else jax.lax.Precision.DEFAULT,
        preferred_element_type=jnp.int32 if x.dtype == jnp.int8 else jnp.float32,
    )  # fmt: skip


def _values(grid: Grid, block: jax.Array, spread: jax.Array, dtype: Any) -> Iterator[jax.Array]:
    """Yields what the codes in each slot stand for, rounded to the activation's dtype."""
    bits = grid.number.bits
    up = 1 if half(grid) else 0  # a zero between codes: one bit more behind the point
    exponents = [(127 + 23 - at - up) << 23 for at in range(0, 8, bits)]
    # Signs are extended, which takes an operation less than not to, and go with the mask.
    wide = jax.lax.bitcast_convert_type(block, jnp.int8).astype(jnp.int32) << up
    wide |= functools.reduce(operator.or_, exponents)
    for slot, exponent in enumerate(exponents):
        at = bits * slot + up
        own = wide & (exponent | (2**bits - 1) << at)
        above = 2.0 ** (23 - at) + grid.number.zero - grid.number.code_min
        value = jax.lax.bitcast_convert_type(own, jnp.float32) - above
        yield (value * spread).astype(dtype)


def _integers(grid: Grid, block: jax.Array) -> Iterator[jax.Array]:
    """Yields the codes in each slot, int8.

    A stored code plus 128 + code_min fits in its byte, and with the highest bit turned it is code, in two's complement.
    """
    bits = grid.number.bits
    four = pltpu.bitcast(block, jnp.int32)
    for slot in range(8 // bits):
        own = (four >> bits * slot) & _everywhere(2**bits - 1)
        code = (own + _everywhere(128 + grid.number.code_min)) ^ _everywhere(128)
        yield pltpu.bitcast(code, jnp.int8)


def _everywhere(byte: int) -> np.int32:
    """Returns a number of 32 bits that is four times the same byte."""
    return np.full(4, byte, np.uint8).view(np.int32)[0]


def _spread(
    lying: Lying, scale: Any, own: Any, number: Any, shape: tuple[int, ...], upright: bool
) -> jax.Array:
    """Returns the scale of each byte of a chunk, float32."""
    if lying.grid.tile is not None:
        each = lying.tile_bytes
        tiles = _part(number, lying.chunk // each, shape[0] // each)
        near = _widened(scale[tiles, own] if lying.scale_turned else scale[own, tiles].T)
        return jnp.broadcast_to(near[:, None], (near.shape[0], each, LANES)).reshape(shape)
    row = _widened(scale[:, own])  # one for an output: [1, outputs]
    if upright:
        return jnp.broadcast_to(row, shape)
    columns = [jnp.broadcast_to(row, (LANES, LANES)).T] * pl.cdiv(shape[1], LANES)
    return jnp.concatenate(columns, axis=1)[:, : shape[1]]


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
