"""Scales that are not the extremum's: a percentile of the magnitudes, a search for the least squared error, or LSQ's.

Absmax keeps the largest element exact and pays for it everywhere else, which at 2 bits is ruinous: one outlier of a row
sets the step for all of it. The search tries fractions of the scale that the weights give and keeps, tile by tile, the
one with the smallest squared error *after* the scale itself has been rounded to its stored type. Where that scale has a
sign (q4_0, q6_k) both are tried, because the grid reaches one step further on one side. An absmean is smaller than the
best ternary step, so fractions of it are taken twice as large.

On a two-level grid what a tile's scale is rounded to depends on its neighbours. There the search goes tile by tile with
unrounded scales, rounds the winners together, and keeps a super-block as the weights gave it where that was better.

With an importance (`importance.py`) the squares are weighed, as in llama.cpp's quantization with an importance matrix
(`make_qx_quants` of ggml-quants.c; there each square is also weighed by the size of its element). `refitted` is
the least that a weighed error asks for: the codes that the extremum gives, and the best scale for those codes.
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
from gemma_qat.numerics.importance import weights_of
from gemma_qat.numerics.qarray import QArray, quantize
from gemma_qat.numerics.scales import TINY, from_weights, pairwise_sum, stored


def mse_search(
    w: Float[Array, "..."],
    grid: Grid,
    reduced: tuple[int, ...],
    *,
    steps: int = 100,
    lowest: float = 0.1,
    highest: float = 1.2,
    importance: Float[Array, "..."] | None = None,
    where: str = "array",
) -> Float[Array, "..."]:
    """Returns, per tile, the scale with the least squared error among `steps` fractions of the one weights give.

    Shapes: w [lead..., reduced..., trail...]; importance [reduced...] or [lead..., reduced...]; result
        [lead..., Q, trail...] float32, as it is stored.
    Exactness: that scale itself is among the candidates, so no tile (no super-block, on a two-level grid) gets worse;
        nor, with an importance, worse under it than without. Equal importance changes no bit.
    """
    fmt = grid.number
    view = w.astype(jnp.float32).reshape(tiles.tiled_shape(w.shape, reduced, grid, where))
    axis = reduced[0] + 1
    base = from_weights(view, axis, grid)
    reach = 2.0 if fmt.scale_rule == "absmean" else 1.0
    fractions = np.append(reach * np.linspace(lowest, highest, steps), 1.0).astype(np.float32)
    if fmt.scale_rule == "signed_extremum":
        fractions = np.concatenate([fractions, -fractions])
    root = None
    if importance is not None:
        root = jnp.sqrt(weights_of(importance, w.shape, reduced, grid, where))
    return _search(view, base, jnp.asarray(fractions[::-1]), root, axis, grid)


@functools.partial(jax.jit, static_argnums=(4, 5))
def _search(
    view: jax.Array,
    base: jax.Array,
    fractions: jax.Array,
    root: jax.Array | None,
    axis: int,
    grid: Grid,
) -> jax.Array:
    fmt = grid.number

    def rounded(scale: jax.Array) -> jax.Array:
        return stored(scale, grid, axis - 1).astype(jnp.float32)

    def error(scale: jax.Array) -> jax.Array:
        wide = jnp.expand_dims(scale, axis)
        values = rounding.from_codes(rounding.to_codes(view, wide, fmt), wide, fmt)
        return _squares(values - view, root, axis)

    def better(best: tuple[jax.Array, jax.Array], fraction: jax.Array):
        scale = base * fraction if grid.two_level else rounded(base * fraction)
        loss = error(scale)
        take = loss < best[1]
        return (jnp.where(take, scale, best[0]), jnp.where(take, loss, best[1])), None

    start = base if grid.two_level else rounded(base)
    (scale, _), _ = jax.lax.scan(better, (start, error(start)), fractions)
    if not grid.two_level:
        return scale
    best, others = rounded(base), [rounded(scale)]
    if (
        root is not None
    ):  # Each tile's best is not the super-block's: plain winners may weigh less together.
        others.insert(0, _search(view, base, fractions, None, axis, grid))
    for other in others:
        take = _of_blocks(error(other), axis - 1, grid) <= _of_blocks(error(best), axis - 1, grid)
        best = jnp.where(take, other, best)
    return best


def _squares(error: jax.Array, root: jax.Array | None, axis: int) -> jax.Array:
    """The sum of each tile's squared errors, times the squares of `root` if there are any."""
    # The root inside: a factor of 1 then leaves the same square, however compilers join it with the sum.
    return jnp.sum(jnp.square(error if root is None else error * root), axis=axis)


def _of_blocks(loss: jax.Array, axis: int, grid: Grid) -> jax.Array:
    """The loss of each tile's super-block."""
    shape, count = loss.shape, grid.number.super_tiles
    blocks = loss.reshape(*shape[:axis], shape[axis] // count, count, *shape[axis + 1 :])
    sums = jnp.sum(blocks, axis=axis + 1, keepdims=True)
    return jnp.broadcast_to(sums, blocks.shape).reshape(shape)


def refitted(
    w: Float[Array, "..."],
    grid: Grid,
    reduced: tuple[int, ...],
    importance: Float[Array, "..."],
    where: str = "array",
) -> QArray:
    """Returns `w` rounded to nearest, each tile with the scale that fits its codes best where that weighs less.

    Codes c come from the scale that the weights give; then scale = sum(i c w) / sum(i c^2) with the importance i, and
    codes are taken again. A tile (a super-block, on a two-level grid) whose weighed error does not fall stays as it
    was.

    Shapes: as of `mse_search`.
    Source: the scale of `make_qx_quants` in ggml-org/llama.cpp (ggml/src/ggml-quants.c); there for several
        sets of codes.
    """
    fmt, axis = grid.number, reduced[0] + 1
    shape = tiles.tiled_shape(w.shape, reduced, grid, where)
    weights = weights_of(importance, w.shape, reduced, grid, where)
    first = quantize(w, grid, reduced, where=where)
    view = w.astype(jnp.float32).reshape(shape)
    levels = first.codes.reshape(shape).astype(jnp.float32) - fmt.zero
    below = jnp.sum(weights * jnp.square(levels), axis=axis)
    fit = jnp.sum(weights * levels * view, axis=axis) / jnp.where(below > 0, below, 1.0)
    unusable = (jnp.abs(fit) < TINY) | (stored(fit, grid, axis - 1) == 0)
    fit = jnp.where(unusable, first.scale.astype(jnp.float32), fit)
    second = quantize(w, grid, reduced, fit, where)

    def error(q: QArray) -> jax.Array:
        difference = q.dequantize().reshape(shape) - view
        loss = _squares(difference, jnp.sqrt(weights), axis)
        return _of_blocks(loss, axis - 1, grid) if grid.two_level else loss

    take = error(second) < error(first)
    wide = jnp.broadcast_to(jnp.expand_dims(take, axis), shape).reshape(w.shape)
    codes = jnp.where(wide, second.codes, first.codes)
    return QArray(codes, jnp.where(take, second.scale, first.scale), grid, reduced)


def percentile_scale(
    w: Float[Array, "..."],
    grid: Grid,
    reduced: tuple[int, ...],
    percentile: float | int = 99.9,
    where: str = "array",
    importance: Float[Array, "..."] | None = None,
) -> Float[Array, "..."]:
    """Returns, per tile, a percentile of the magnitudes over the magnitude of the grid's divisor.

    What lies above it saturates. Between elements the percentile is interpolated linearly, as in small tiles it must
    be; a scale that has a sign keeps that of the extremum's. A tile whose percentile makes no usable scale (most of its
    elements are zero) gets the scale that the weights give.

    With an importance a magnitude counts as much as it weighs: of what matters, not of how many there are, 0.1 % lies
    above the 99.9th.

    Shapes: w [lead..., reduced..., trail...]; importance as of `mse_search`; result [lead..., Q, trail...] float32, as
        it is stored.
    Units: percentile in 0 .. 100, 100 being the extremum.
    Raises: ValueError for a percentile out of range, or when the tile does not divide the reduced axes.
    """
    if not 0 < percentile <= 100:
        raise ValueError(f"percentile {percentile} given, above 0 and at most 100 expected")
    view = w.astype(jnp.float32).reshape(tiles.tiled_shape(w.shape, reduced, grid, where))
    axis = reduced[0] + 1
    base = from_weights(view, axis, grid)
    if importance is None:
        magnitude = _percentile(jnp.abs(view), axis, percentile / 100)
    else:
        weights = weights_of(importance, w.shape, reduced, grid, where)
        magnitude = _weighed_percentile(jnp.abs(view), weights, axis, percentile / 100)
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


def _weighed_percentile(
    magnitudes: jax.Array, weights: jax.Array, axis: int, share: float
) -> jax.Array:
    """The percentile where neighbours lie as far apart as they weigh on average; `_percentile` with equal weights."""
    order = jnp.argsort(magnitudes, axis=axis)
    ordered = jnp.moveaxis(jnp.take_along_axis(magnitudes, order, axis=axis), axis, -1)
    weights = jnp.broadcast_to(weights, magnitudes.shape)
    weights = jnp.moveaxis(jnp.take_along_axis(weights, order, axis=axis), axis, -1)
    if ordered.shape[-1] == 1:
        return ordered[..., 0]
    apart = (weights[..., 1:] + weights[..., :-1]) / 2
    above = jnp.flip(
        jnp.cumsum(jnp.flip(apart, -1), axis=-1), -1
    )  # From the top: there digits matter.
    target = above[..., :1] * np.float32(1 - share)
    at = jnp.maximum(jnp.sum(above > target, axis=-1, keepdims=True) - 1, 0)
    distance, low = (jnp.take_along_axis(x, at, axis=-1) for x in (apart, ordered))
    high = jnp.take_along_axis(ordered, at + 1, axis=-1)
    way = (jnp.take_along_axis(above, at, axis=-1) - target) / jnp.where(distance > 0, distance, 1)
    return (low + (high - low) * jnp.clip(way, 0, 1))[..., 0]


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
