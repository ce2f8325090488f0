"""How much each row of a weight matters: the diagonal importance that searches weigh squared errors with.

    y = x W,  an error d in W costs about  sum_r E[x_r^2] d_r^2  a token

where products of different inputs average out. So the weight of an element is the mean square of what it is multiplied
with, which is the same for every output; experts each have their own. It is llama.cpp's importance matrix.

Only ratios within a tile (a super-block, on a two-level grid) decide anything, and there weights are divided by the
largest: equal weights are exactly 1, whatever they were. Where all are 0 (an expert that no token chose) they are 1.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from gemma_qat.numerics import tiles
from gemma_qat.numerics.formats import Grid


def weights_of(
    importance: Float[Array, "..."],
    shape: tuple[int, ...],
    reduced: tuple[int, ...],
    grid: Grid,
    where: str = "array",
) -> Float[Array, "..."]:
    """Returns what squared errors of the tiled view of a weight of `shape` are multiplied with.

    Shapes: importance [reduced...] or [lead..., reduced...], reduced axes merged or not; result
        [lead..., Q, tile, 1...], ones in place of lead axes that it lacks.
    Units: any of its own, at least 0; the result is 1 at most.
    Raises: ValueError for an importance of another size, naming both.
    """
    lead, length, trail = tiles.split_axes(shape, reduced)
    if importance.size == length:
        lead = (1,) * len(lead)
    elif importance.size != math.prod(lead) * length:
        raise ValueError(
            f"{where}: importance of shape {importance.shape} given, {length} elements expected"
            + (f" or {math.prod(lead)} times as many" if lead else "")
        )
    count = grid.tiles(length, where)
    together = grid.number.super_tiles
    blocks = importance.astype(jnp.float32).reshape(
        *lead, count // together, length // count * together
    )
    top = jnp.max(blocks, axis=-1, keepdims=True)
    shares = jnp.where(blocks == top, 1.0, blocks / jnp.where(top > 0, top, 1.0))
    return shares.reshape(*lead, count, length // count, *(1,) * len(trail))
