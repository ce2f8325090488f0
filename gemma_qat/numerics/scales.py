"""Where a tile's scale comes from: its extremum, or a search for the least squared error.

Absmax keeps the largest element exact and pays for it everywhere else, which at 2 bits is ruinous: one outlier of a row
sets the step for all of it. The search tries fractions of the absmax scale and keeps, tile by tile, the one with the
smallest squared error *after* the scale itself has been rounded to its stored type. For q4_0 both signs are tried,
because the grid reaches one step further on one side.

A tile whose scale would be a subnormal float32, or 0 in its stored type, has no usable grid: its scale is 1 (0 for
q4_0 and for grids without a zero) and its codes stand for zeros.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gemma_qat.numerics import rounding
from gemma_qat.numerics.formats import Format, Grid

_TINY = float(np.finfo(np.float32).tiny)


def empty_scale(fmt: Format) -> float:
    """Returns the scale written for a tile of zeros."""
    return 0.0 if fmt.scale_rule == "signed_extremum" or fmt.zero != fmt.zero_code else 1.0


def from_weights(view: Float[Array, "..."], axis: int, grid: Grid) -> Float[Array, "..."]:
    """Returns the float32 scale of each tile, from its extremum.

    Shapes: view [..., tile at `axis`, ...]; result without that axis.
    """
    fmt = grid.number
    if fmt.scale_rule == "signed_extremum":
        index = jnp.argmax(jnp.abs(view), axis=axis, keepdims=True)
        extremum = jnp.take_along_axis(view, index, axis=axis).squeeze(axis)
    else:
        extremum = jnp.max(jnp.abs(view), axis=axis)
    # Times the reciprocal, as XLA would make of a division by a constant: see `rounding.py`.
    scale = extremum * (np.float32(1) / np.float32(grid.divisor))
    empty = empty_scale(fmt)
    unusable = (jnp.abs(scale) < _TINY) | (stored(scale, grid) == 0)
    # A zero keeps its sign: ggml writes d = 0 / -8 = -0.0 for a tile of zeros.
    return jnp.where(unusable, empty or jnp.copysign(0.0, scale), scale)


def stored(scale: Float[Array, "..."], grid: Grid) -> Float[Array, "..."]:
    """Returns float32 scales rounded to the type they are stored in."""
    return scale.astype(jnp.dtype(grid.scale_dtype))


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
    """Returns, per tile, the scale with the least squared error among `steps` fractions of the absmax scale.

    Shapes: w [lead..., reduced..., trail...]; result [lead..., Q, trail...] float32, representable in the scale dtype.
    Exactness: the absmax scale itself is among the candidates, so no tile gets worse than by absmax.
    """
    from gemma_qat.numerics import tiles

    fmt = grid.number
    view = w.astype(jnp.float32).reshape(tiles.tiled_shape(w.shape, reduced, grid, where))
    axis = reduced[0] + 1
    base = from_weights(view, axis, grid)
    fractions = np.append(np.linspace(lowest, highest, steps), 1.0).astype(np.float32)
    if fmt.scale_rule == "signed_extremum":
        fractions = np.concatenate([fractions, -fractions])
    return _search(view, base, jnp.asarray(fractions[::-1]), axis, grid)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _search(
    view: jax.Array, base: jax.Array, fractions: jax.Array, axis: int, grid: Grid
) -> jax.Array:
    fmt = grid.number

    def error(scale: jax.Array) -> jax.Array:
        wide = jnp.expand_dims(scale, axis)
        values = rounding.from_codes(rounding.to_codes(view, wide, fmt), wide, fmt)
        return jnp.sum(jnp.square(values - view), axis=axis)

    def better(best: tuple[jax.Array, jax.Array], fraction: jax.Array):
        scale = stored(base * fraction, grid).astype(jnp.float32)
        loss = error(scale)
        take = loss < best[1]
        return (jnp.where(take, scale, best[0]), jnp.where(take, loss, best[1])), None

    start = stored(base, grid).astype(jnp.float32)
    (scale, _), _ = jax.lax.scan(better, (start, error(start)), fractions)
    return scale
