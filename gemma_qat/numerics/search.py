"""Scales that are not the extremum's: a percentile of the magnitudes, a search for the least squared error, or LSQ's.

Absmax keeps the largest element exact and pays for it everywhere else, which at 2 bits is ruinous: one outlier of a row
sets the step for all of it. The search tries fractions of the scale that the weights give and keeps, tile by tile, the
one with the smallest squared error *after* the scale itself has been rounded to its stored type. Where that scale has a
sign (q4_0, q6_k) both are tried, because the grid reaches one step further on one side. An absmean is smaller than the
best ternary step, so fractions of it are taken twice as large.

On a two-level grid what a tile's scale is rounded to depends on its neighbours. There the search goes tile by tile with
unrounded scales, rounds the winners together, and keeps a super-block as the weights gave it where that was better.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gemma_qat.numerics import rounding, tiles
from gemma_qat.numerics.formats import Grid
from gemma_qat.numerics.scales import TINY, from_weights, pairwise_sum, stored


def mse_search(
    w: Float[Array, "..."],
    grid: Grid,
    reduced: tuple[int, ...],
    *,
    steps: int = 100,
    lowest: float = 0.1,
    highest: float = 1.2,
    where: str = "array",
) -> Float[Array, "..."]:
    """Returns, per tile, the scale with the least squared error among `steps` fractions of the one weights give.

    Shapes: w [lead..., reduced..., trail...]; result [lead..., Q, trail...] float32, as it is stored.
    Exactness: that scale itself is among the candidates, so no tile (no super-block, on a two-level grid) gets worse.
    """
    fmt = grid.number
    view = w.astype(jnp.float32).reshape(tiles.tiled_shape(w.shape, reduced, grid, where))
    axis = reduced[0] + 1
    base = from_weights(view, axis, grid)
    reach = 2.0 if fmt.scale_rule == "absmean" else 1.0
    fractions = np.append(reach * np.linspace(lowest, highest, steps), 1.0).astype(np.float32)
    if fmt.scale_rule == "signed_extremum":
        fractions = np.concatenate([fractions, -fractions])
    return _search(view, base, jnp.asarray(fractions[::-1]), axis, grid)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _search(
    view: jax.Array, base: jax.Array, fractions: jax.Array, axis: int, grid: Grid
) -> jax.Array:
    fmt = grid.number

    def rounded(scale: jax.Array) -> jax.Array:
        return stored(scale, grid, axis - 1).astype(jnp.float32)

    def error(scale: jax.Array) -> jax.Array:
        wide = jnp.expand_dims(scale, axis)
        values = rounding.from_codes(rounding.to_codes(view, wide, fmt), wide, fmt)
        return jnp.sum(jnp.square(values - view), axis=axis)

    def better(best: tuple[jax.Array, jax.Array], fraction: jax.Array):
        scale = base * fraction if grid.two_level else rounded(base * fraction)
        loss = error(scale)
        take = loss < best[1]
        return (jnp.where(take, scale, best[0]), jnp.where(take, loss, best[1])), None

    start = base if grid.two_level else rounded(base)
    (scale, _), _ = jax.lax.scan(better, (start, error(start)), fractions)
    if not grid.two_level:
        return scale
    scale, start = rounded(scale), rounded(base)
    take = _of_blocks(error(scale), axis - 1, grid) <= _of_blocks(error(start), axis - 1, grid)
    return jnp.where(take, scale, start)


def _of_blocks(loss: jax.Array, axis: int, grid: Grid) -> jax.Array:
    """The loss of each tile's super-block."""
    shape, count = loss.shape, grid.number.super_tiles
    blocks = loss.reshape(*shape[:axis], shape[axis] // count, count, *shape[axis + 1 :])
    sums = jnp.sum(blocks, axis=axis + 1, keepdims=True)
    return jnp.broadcast_to(sums, blocks.shape).reshape(shape)


def percentile_scale(
    w: Float[Array, "..."],
    grid: Grid,
    reduced: tuple[int, ...],
    percentile: float | int = 99.9,
    where: str = "array",
) -> Float[Array, "..."]:
    """Returns, per tile, a percentile of the magnitudes over the magnitude of the grid's divisor.

    What lies above it saturates. Between elements the percentile is interpolated linearly, as in small tiles it must
    be; a scale that has a sign keeps that of the extremum's. A tile whose percentile makes no usable scale (most of its
    elements are zero) gets the scale that the weights give.

    Shapes: w [lead..., reduced..., trail...]; result [lead..., Q, trail...] float32, as it is stored.
    Units: percentile in 0 .. 100, 100 being the extremum.
    Raises: ValueError for a percentile out of range, or when the tile does not divide the reduced axes.
    """
    if not 0 < percentile <= 100:
        raise ValueError(f"percentile {percentile} given, above 0 and at most 100 expected")
    view = w.astype(jnp.float32).reshape(tiles.tiled_shape(w.shape, reduced, grid, where))
    axis = reduced[0] + 1
    base = from_weights(view, axis, grid)
    magnitude = _percentile(jnp.abs(view), axis, percentile / 100)
    scale = magnitude * (np.float32(1) / np.float32(abs(grid.divisor)))
    unusable = (scale < TINY) | (stored(scale, grid, axis - 1) == 0)
    scale = jnp.where(unusable, base, jnp.copysign(scale, base))
    return stored(scale, grid, axis - 1).astype(jnp.float32)


def _percentile(magnitudes: jax.Array, axis: int, share: float) -> jax.Array:
    place = share * (magnitudes.shape[axis] - 1)
    below = math.floor(place)
    ordered = jnp.sort(magnitudes, axis=axis)
    low = jax.lax.index_in_dim(ordered, below, axis, keepdims=False)
    high = jax.lax.index_in_dim(ordered, math.ceil(place), axis, keepdims=False)
    # The product is not negative; saying so keeps compilers from fusing it with the sum.
    return low + jnp.maximum((high - low) * np.float32(place - below), 0.0)


def lsq_scale(
    w: Float[Array, "..."], grid: Grid, reduced: tuple[int, ...], where: str = "array"
) -> Float[Array, "..."]:
    """Returns, per tile, where learned step sizes start: 2 mean|w| / sqrt(h), h the grid's highest value in scales.

    A scale that has a sign takes that of the extremum's; a tile that makes no usable scale gets the one weights give.

    Shapes: w [lead..., reduced..., trail...]; result [lead..., Q, trail...] float32, as it is stored.
    Raises: ValueError when the tile does not divide the reduced axes.
    Source: Learned Step Size Quantization (arXiv 1902.08153), 2.1, where h is Q_P; a step there is a layer's.
    """
    view = w.astype(jnp.float32).reshape(tiles.tiled_shape(w.shape, reduced, grid, where))
    axis = reduced[0] + 1
    base = from_weights(view, axis, grid)
    factor = 2 / (view.shape[axis] * math.sqrt(grid.number.highest))
    scale = pairwise_sum(jnp.abs(view), axis) * np.float32(factor)
    unusable = (scale < TINY) | (stored(scale, grid, axis - 1) == 0)
    scale = jnp.where(unusable, base, jnp.copysign(scale, base))
    return stored(scale, grid, axis - 1).astype(jnp.float32)
