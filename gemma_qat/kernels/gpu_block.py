"""What the kernels for GPU share: a block of packed words, how it is read, decoded and multiplied (Pallas, Triton).

    words [O, W]:   a program has `outputs` rows and walks W in chunks; a byte holds a code in each slot
    values [outputs, chunk] of a slot  *  activation [slot, m, chunk]  ->  sums

Decoding makes the very numbers the definition multiplies: (code - zero) * scale in float32, rounded to the activation's
dtype. It takes neither a shift nor a conversion: a code at bit b of a byte, put among the bits of the float32 number
2^(23 - b), adds its own value to it, as bit b of that number's mantissa is worth 1.

    bits of 2^(23 - b)  |  byte & mask   =   2^(23 - b) + code          exactly

Where all values are powers of two times one scale a row (2 bits a channel), rounding products is rounding the scale:
codes are summed, two decoded at once in bfloat16, and the sums are scaled.

Source of the trick: Kim et al. 2022, "Who Says Elephants Can't Run" (arXiv 2211.10017), there for float16.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from gemma_qat.kernels.gpu_tiling import Tiling
from gemma_qat.kernels.problem import by_slots, codes_in, half
from gemma_qat.numerics import Grid

MANTISSA = 23
"""Bits of a float32's mantissa."""


def stored_values(words: jax.Array, grid: Grid, slot: int) -> jax.Array:
    """Returns (code - zero) of the codes in one slot of bytes (int32), float32, exact."""
    fmt = grid.number
    up = 1 if half(grid) else 0  # a bit of the mantissa more, that a half has a place in it
    place = fmt.bits * slot + up
    exponent = MANTISSA - place
    mask = (2**fmt.bits - 1) << place
    number = ((words << up if up else words) & mask) | ((127 + exponent) << MANTISSA)
    return jax.lax.bitcast_convert_type(number, jnp.float32) - (
        2.0**exponent + (fmt.zero - fmt.code_min)
    )


def has_no_products_to_round(grid: Grid) -> bool:
    """Returns whether all values are 0 or powers of two times the scale: rounding a product then rounds the scale.

    Where a row has one scale too, codes can be summed and the sum be scaled.
    """
    fmt = grid.number
    values = (abs(code - fmt.zero) for code in range(fmt.code_min, fmt.code_max + 1))
    return grid.tile is None and all(v == 0 or math.frexp(v)[0] == 0.5 for v in values)


def small_values(words: jax.Array, grid: Grid, slot: int) -> jax.Array:
    """Returns `stored_values` of bytes as bfloat16, exact: the same way, with the 7 bits of its mantissa."""
    fmt = grid.number
    wide, place = words.astype(jnp.int16), fmt.bits * slot
    if place + fmt.bits > 7:  # past the mantissa
        wide, place = wide >> place, 0
    exponent = 7 - place
    mask = (2**fmt.bits - 1) << place
    number = (wide & jnp.int16(mask)) | jnp.int16((127 + exponent) << 7)
    offset = 2.0**exponent + (fmt.zero - fmt.code_min)
    return jax.lax.bitcast_convert_type(number, jnp.bfloat16) - jnp.bfloat16(offset)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """The rows of words a program has: how to read and decode them."""

    grid: Grid
    dtype: str
    """Of the activation; int8 for sums of products of codes."""
    outputs: int
    """O, of the weight."""
    width: int
    """W, of a row."""
    tiles: int
    """Q, of a row."""
    tiling: Tiling

    @property
    def slots(self) -> int:
        """Codes of a byte."""
        return 8 // self.grid.number.bits

    @property
    def sum_dtype(self) -> Any:
        """Of sums."""
        return jnp.int32 if self.dtype == "int8" else jnp.float32

    def inside(self, first: jax.Array) -> jax.Array:
        """Returns which of the rows of words from `first` on there are, [outputs]."""
        return first + jnp.arange(self.tiling.outputs) < self.outputs

    def words(self, ref: Any, lead: tuple, first: jax.Array, step: jax.Array) -> jax.Array:
        """Returns a chunk of words, uint8 [outputs, chunk]; zeros where there are none."""
        chunk = self.tiling.chunk
        start = step * chunk
        mask = _both(
            self.inside(first) if self.outputs % self.tiling.outputs else None,
            start + jnp.arange(chunk) < self.width if self.tiling.walked != self.width else None,
            (self.tiling.outputs, chunk),
        )
        part = ref.at[(*lead, pl.ds(first, self.tiling.outputs), pl.ds(start, chunk))]
        return _load(part, mask)

    def scales(self, ref: Any, lead: tuple, first: jax.Array, step: jax.Array) -> jax.Array:
        """Returns the scales of a chunk, float32 [outputs, chunk]; zeros where there are none."""
        rows, chunk = self.tiling.outputs, self.tiling.chunk
        tile = self.tile_bytes
        count = max(1, chunk // tile)
        start = step * count if tile <= chunk else step * chunk // tile
        past = self.tiling.walked > self.tiles * tile
        mask = _both(
            self.inside(first) if self.outputs % rows else None,
            start + jnp.arange(count) < self.tiles if past else None,
            (rows, count),
        )
        part = ref.at[(*lead, pl.ds(first, rows), pl.ds(start, count))]
        scale = _load(part, mask).astype(jnp.float32)
        spread = jnp.broadcast_to(scale[:, :, None], (rows, count, chunk // count))
        return spread.reshape(rows, chunk)

    def scale_of_rows(self, ref: Any, lead: tuple, first: jax.Array) -> jax.Array:
        """Returns the one scale of each row, rounded to the activation's dtype, float32 [outputs]."""
        part = ref.at[(*lead, pl.ds(first, self.tiling.outputs), pl.ds(0, 1))]
        mask = self.inside(first)[:, None] if self.outputs % self.tiling.outputs else None
        scale = _load(part, mask).reshape(self.tiling.outputs)
        return scale.astype(self.dtype).astype(jnp.float32)

    @property
    def tile_bytes(self) -> int:
        """Bytes that share a scale, a power of two: for one scale a row, more than all programs walk."""
        if self.grid.tile is None:
            return 2 ** math.ceil(math.log2(self.tiling.walked))
        return self.grid.tile * self.grid.number.bits // 8

    def decoded(
        self, refs: tuple[Any, ...], lead: tuple, first: jax.Array, step: jax.Array
    ) -> Callable[[int], jax.Array]:
        """Reads a chunk; returns what gives the numbers [outputs, chunk] in a slot of it, in the activation's dtype."""
        words = self.words(refs[0], lead, first, step)
        if self.dtype == "int8":
            return lambda slot: codes_in(words, self.grid, slot).astype(jnp.int8)
        if self.scaled_last and self.dtype == "bfloat16":
            return lambda slot: small_values(words, self.grid, slot)
        words = words.astype(jnp.int32)
        if self.scaled_last:
            return lambda slot: stored_values(words, self.grid, slot)
        scales = self.scales(refs[1], lead, first, step)
        return lambda slot: (stored_values(words, self.grid, slot) * scales).astype(self.dtype)

    @property
    def scaled_last(self) -> bool:
        """Whether sums are scaled, and not weights."""
        return self.dtype != "int8" and has_no_products_to_round(self.grid)

    def sums(
        self, x_ref: Any, refs: tuple[Any, ...], lead: tuple, first: jax.Array, *,
        row: jax.Array | int = 0, begin: jax.Array | int = 0,
    ) -> jax.Array | list[jax.Array]:  # fmt: skip
        """Returns the sums over the program's chunks: [outputs, rows] by tensor cores, or [outputs] of each row.

        Shapes: x_ref [slot, ., bytes walked], from `row` on; `refs` of words and scales, `lead` their expert, if any;
        `first` the first output, `begin` the first chunk.
        """
        make = self._by_dots if self.tiling.dots else self._by_arithmetic

        def read(step: jax.Array) -> tuple[Callable[[int], jax.Array], Any]:
            place = pl.ds((begin + step) * self.tiling.chunk, self.tiling.chunk)
            return self.decoded(refs, lead, first, begin + step), place

        sums = make(x_ref, read, row)
        if not self.scaled_last:
            return sums
        scale = self.scale_of_rows(refs[1], lead, first)
        if isinstance(sums, list):
            return [one * scale for one in sums]
        return sums * scale[:, None]

    def _by_arithmetic(self, x_ref: Any, read: Any, row: jax.Array | int) -> list[jax.Array]:
        """Each thread keeps sums of its own, which are added at the end."""

        def body(step: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            number, place = read(step)
            for slot in range(self.slots):
                value = number(slot)
                xs = [x_ref[slot, row + n, place] for n in range(len(sums))]
                sums = tuple(s + value * x[None, :] for s, x in zip(sums, xs, strict=True))
            return sums

        zeros = jnp.zeros((self.tiling.outputs, self.tiling.chunk), self.sum_dtype)
        sums = jax.lax.fori_loop(0, self.tiling.steps, body, (zeros,) * self.tiling.rows)
        return [jnp.sum(one, axis=1) for one in sums]

    def _by_dots(self, x_ref: Any, read: Any, row: jax.Array | int) -> jax.Array:
        """Words are the left side, so that few rows waste little; float32 is multiplied as it is, not rounded."""
        exact = jax.lax.Precision.HIGHEST if self.dtype == "float32" else None

        def body(step: jax.Array, sums: jax.Array) -> jax.Array:
            number, place = read(step)
            for slot in range(self.slots):
                sums += jax.lax.dot_general(
                    number(slot), x_ref[slot, pl.ds(row, self.tiling.rows), place],
                    (((1,), (1,)), ((), ())), precision=exact,
                    preferred_element_type=self.sum_dtype,
                )  # fmt: skip
            return sums

        zeros = jnp.zeros((self.tiling.outputs, self.tiling.rows), self.sum_dtype)
        return jax.lax.fori_loop(0, self.tiling.steps, body, zeros)

    def by_rows(self, sums: jax.Array | list[jax.Array]) -> list[tuple[Any, jax.Array]]:
        """Returns (which rows, their sums [rows, outputs]) of what `sums` gives."""
        if not isinstance(sums, list):
            return [(pl.ds(0, self.tiling.rows), sums.T)]
        return [(pl.ds(n, 1), one[None, :]) for n, one in enumerate(sums)]


def _both(rows: jax.Array | None, columns: jax.Array | None, shape: tuple[int, int]) -> Any:
    masks = [
        jnp.broadcast_to(jnp.expand_dims(mask, axis), shape)
        for mask, axis in ((rows, 1), (columns, 0))
        if mask is not None
    ]
    return functools.reduce(jnp.logical_and, masks) if masks else None


def _load(part: Any, mask: jax.Array | None) -> jax.Array:
    return plgpu.load(part) if mask is None else plgpu.load(part, mask=mask, other=0)


@runtime_checkable
class Launched(Protocol):
    """What of a tiling a kernel is compiled with."""

    @property
    def warps(self) -> int:
        """Of a program, 32 threads each."""

    @property
    def stages(self) -> int:
        """Steps of a loop that are under way at a time."""


def laid_out(x: jax.Array, block: Block, rows: int) -> jax.Array:
    """Returns an activation [M, R] as [slot, rows, bytes walked], zeros where there is none of it."""
    slots = by_slots(x, block.grid)
    more = (rows - slots.shape[1], block.tiling.walked - slots.shape[2])
    return jnp.pad(slots, ((0, 0), (0, more[0]), (0, more[1])))


def launch(
    kernel: Callable[..., None], *arguments: jax.Array, name: str, out_shape: Any,
    grid: tuple[int, ...], tiling: Launched,
) -> Any:  # fmt: skip
    """Runs a kernel: on a GPU; elsewhere, where only who asks for it by name gets here, interpreted."""

    def like(shape: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        """A result differs along every mesh axis along which an argument does (inside `shard_map`)."""

        def first_elements(*arguments: jax.Array) -> jax.Array:
            firsts = (a[(0,) * a.ndim].astype(shape.dtype) for a in arguments)
            return jnp.broadcast_to(functools.reduce(jnp.add, firsts), shape.shape)

        return jax.eval_shape(first_elements, *arguments)

    out_shape = jax.tree.map(like, out_shape)

    def run(interpret: bool) -> Any:
        return pl.pallas_call(
            kernel, name=name, out_shape=out_shape, grid=grid, interpret=interpret,
            compiler_params=plgpu.CompilerParams(
                num_warps=tiling.warps, num_stages=tiling.stages
            ),
        )  # fmt: skip

    return jax.lax.platform_dependent(*arguments, cuda=run(False), default=run(True))
