"""Views of a weight in which a tile is an axis of its own.

A weight has reduced axes that stand next to each other (`DNH`: D; `NHD`: N and H; `EDF`: D; `VD` as a table: D). The
tiled view merges them and splits the result:

    [lead..., reduced..., trail...]  ->  [lead..., Q, tile, trail...]        scales: [lead..., Q, trail...]

Nothing is transposed, so the view costs nothing on any device and an element's scale is found by the same indices.
"""

from __future__ import annotations

import math

from jaxtyping import Array, Shaped

from gemma_qat.numerics.formats import Grid


def split_axes(
    shape: tuple[int, ...], reduced: tuple[int, ...]
) -> tuple[tuple[int, ...], int, tuple[int, ...]]:
    """Returns (lead shape, product of the reduced axes, trail shape).

    Raises: ValueError when the reduced axes do not stand next to each other.
    """
    first, last = reduced[0], reduced[-1]
    if reduced != tuple(range(first, last + 1)) or last >= len(shape):
        raise ValueError(f"reduced axes {reduced} of shape {shape} do not stand next to each other")
    return shape[:first], math.prod(shape[first : last + 1]), shape[last + 1 :]


def tiled_shape(
    shape: tuple[int, ...], reduced: tuple[int, ...], grid: Grid, where: str = "array"
) -> tuple[int, ...]:
    """Returns the shape of the tiled view, [lead..., Q, tile, trail...].

    Raises: ValueError when the tile does not divide the reduced axes.
    """
    lead, length, trail = split_axes(shape, reduced)
    tiles = grid.tiles(length, where)
    return (*lead, tiles, length // tiles, *trail)


def scale_shape(
    shape: tuple[int, ...], reduced: tuple[int, ...], grid: Grid, where: str = "array"
) -> tuple[int, ...]:
    """Returns the shape of the scales of a weight, [lead..., Q, trail...].

    Raises: ValueError when the tile does not divide the reduced axes.
    """
    view = tiled_shape(shape, reduced, grid, where)
    axis = reduced[0] + 1
    return (*view[:axis], *view[axis + 1 :])


def merged(x: Shaped[Array, "..."], reduced: tuple[int, ...]) -> Shaped[Array, "..."]:
    """Returns `x` with its reduced axes merged into one."""
    lead, length, trail = split_axes(x.shape, reduced)
    return x.reshape(*lead, length, *trail)
