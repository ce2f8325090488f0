"""Codes and scales found again in weights that were on a q4_0 grid and then rounded to bfloat16.

A released `-unquantized` checkpoint holds w = bfloat16((c - 8) d), c a code and d the tile's float16 scale. Rounding w
to the grid anew takes d from the rounded extremum, which is another number for most tiles: codes survive, scales do
not. But bfloat16 keeps 8 bits of a number and float16 keeps 11, so only a few float16 numbers d can stand behind an
extremum, and all elements of the tile have to agree:

    d fits   when   bfloat16((round(w / d)) d) = w   for every element of the tile

An element of largest magnitude stands for level -8, as the format has it; where no d fits (learned scales, whose
extremum may be any level), the others are tried, largest first. Where several d fit, nothing in the file says
which it was: the middle one is taken, which is at most half their spread away, and they are counted.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gemma_qat.numerics import rounding, tiles
from gemma_qat.numerics.formats import Grid
from gemma_qat.numerics.qarray import QArray, quantize

LEVELS = (-8, -7, 7, -6, 6, -5, 5, -4, 4, -3, 3, -2, 2, -1, 1)
"""What the element of largest magnitude may stand for, in the order in which it is tried.

Below 8 both signs of a scale give the same values; the format starts with a negative level, so that is tried first.
"""

_LARGEST_FLOAT16 = 0x7BFF


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Recovered:
    """What was found in one weight.

    Shapes: per tile, as scales. `fitting`: float16 scales that give back the tile's bits, 0 where none does (there the
    codes are those of rounding to nearest); `level`: what its extremum stands for (-8 but for learned scales).
    """

    quantized: QArray
    fitting: Any
    level: Any


@functools.partial(jax.jit, static_argnames=("grid", "reduced", "levels"))
def recover(
    w: Float[Array, "..."],
    grid: Grid,
    reduced: tuple[int, ...],
    levels: tuple[int, ...] = LEVELS[:1],
) -> Recovered:
    """Returns the codes and scales that `w` was rounded from, tile by tile.

    Shapes: w [lead..., reduced..., trail...], bfloat16 values in any float dtype; grid: one of the format q4_0.
    Exactness: a tile with `fitting` > 0 gives back `w` bit for bit when its dequantized values are rounded to bfloat16
    (0 and -0 count as equal). Tiles of zeros have the scale 0, which fits.
    """
    axis = reduced[0] + 1
    view = w.astype(jnp.float32).reshape(tiles.tiled_shape(w.shape, reduced, grid))
    at = jnp.argmax(jnp.abs(view), axis, keepdims=True)
    extremum = jnp.take_along_axis(view, at, axis)
    nearest = quantize(w, grid, reduced)
    scale, fitting = _fitting(view, extremum / levels[0], axis, grid, 4)
    level = jnp.full(scale.shape, levels[0])

    def try_level(found: Any, top: jax.Array) -> tuple[Any, None]:
        scale, fitting, level = found
        other, count = _fitting(view, extremum / top, axis, grid, 8)
        new = (fitting == 0) & (count > 0)
        scale = jnp.where(new, other, scale)
        return (scale, jnp.where(new, count, fitting), jnp.where(new, top, level)), None

    if levels[1:]:
        others = jnp.array(levels[1:])
        (scale, fitting, level), _ = jax.lax.scan(try_level, (scale, fitting, level), others)
    scale = jnp.where(fitting > 0, scale, jnp.expand_dims(nearest.scale, axis))
    zero = extremum == 0
    scale, fitting = jnp.where(zero, 0, scale), jnp.where(zero, 1, fitting)
    codes = rounding.to_codes(view, scale.astype(jnp.float32), grid.number)
    nearest_codes = nearest.codes.reshape(view.shape)
    codes = jnp.where(fitting > 0, codes, nearest_codes).reshape(w.shape)
    q = QArray(codes=codes, scale=jnp.squeeze(scale, axis), grid=grid, reduced=reduced)
    return Recovered(q, jnp.squeeze(fitting, axis), jnp.squeeze(level, axis))


def returned(w: Float[Array, "..."], q: QArray) -> jax.Array:
    """Returns for each tile whether its dequantized values, rounded to bfloat16, are those of `w`; shape as scales."""
    view = tiles.tiled_shape(w.shape, q.reduced, q.grid)
    same = q.dequantize().astype(jnp.bfloat16).astype(jnp.float32) == w.astype(jnp.float32)
    return jnp.all(same.reshape(view), axis=q.reduced[0] + 1)


def _fitting(
    view: jax.Array, guess: jax.Array, axis: int, grid: Grid, steps: int
) -> tuple[jax.Array, jax.Array]:
    """Returns the middle one of the float16 scales around `guess` that fit, and how many there are.

    `steps` on either side: what bfloat16(level d) = w leaves d is 2^-8 of it at most, and float16 numbers are 2^-11 of
    it apart at least; half of that where the level is a power of two.
    """

    def look(mask: jax.Array, place: jax.Array) -> tuple[jax.Array, None]:
        fits = _fits(view, _stepped(guess, place - steps), axis, grid)
        return mask | jnp.left_shift(fits.astype(jnp.int32), place), None

    places = jnp.arange(2 * steps + 1)
    mask, _ = jax.lax.scan(look, jnp.zeros(guess.shape, jnp.int32), places)
    fits = jnp.right_shift(mask[..., None], _last(places, mask)) & 1
    count = jnp.sum(fits, -1)
    mean = jnp.sum(fits * _last(places, mask), -1) / jnp.maximum(count, 1)
    away = jnp.where(fits == 1, jnp.abs(_last(places, mask) - mean[..., None]), jnp.inf)
    return _stepped(guess, jnp.argmin(away, -1) - steps), count


def _last(x: jax.Array, like: jax.Array) -> jax.Array:
    return x.reshape((1,) * like.ndim + x.shape)


def _fits(view: jax.Array, scale: jax.Array, axis: int, grid: Grid) -> jax.Array:
    wide = scale.astype(jnp.float32)
    codes = rounding.to_codes(view, wide, grid.number)
    again = rounding.from_codes(codes, wide, grid.number).astype(jnp.bfloat16)
    same = jnp.all(again.astype(jnp.float32) == view, axis, keepdims=True)
    return same & jnp.isfinite(wide) & (wide != 0)


def _stepped(x: jax.Array, offset: jax.Array) -> jax.Array:
    """Returns the float16 number `offset` steps away from the one nearest to `x`, away from 0 where positive."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float16), jnp.uint16).astype(jnp.int32)
    magnitude = jnp.clip((bits & 0x7FFF) + offset, 0, _LARGEST_FLOAT16)
    stepped = (magnitude | (bits & 0x8000)).astype(jnp.uint16)
    return jax.lax.bitcast_convert_type(stepped, jnp.float16)
