"""Codes with their scales: the quantized form of a weight while it is worked on.

weight [R, O]  --quantize(grid)-->  QArray(codes [R, O] int8, scale [Q, O])  --dequantize-->  [R, O] float32
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gemma_qat.errors import InputError
from gemma_qat.numerics import rounding, scales, tiles
from gemma_qat.numerics.formats import Grid


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QArray:
    """Codes and scales of one weight.

    Shapes: codes as the weight, int8; scale [lead..., Q, trail...] in the grid's scale dtype.
    Units: value = (codes - zero) * scale; scale is in units of the weight per code.
    """

    # Untyped on purpose: transforms rebuild pytrees around tracers, shapes and placeholders.
    codes: Any
    scale: Any
    grid: Grid = dataclasses.field(metadata={"static": True})
    reduced: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.codes.shape

    def dequantize(self) -> jax.Array:
        """Returns the weight these codes stand for, float32, one rounding per element."""
        view = tiles.tiled_shape(self.codes.shape, self.reduced, self.grid)
        scale = jnp.expand_dims(self.scale, self.reduced[0] + 1)
        values = rounding.from_codes(self.codes.reshape(view), scale, self.grid.number)
        return values.reshape(self.codes.shape)


def refuse_nonfinite(x: jax.Array | np.ndarray, where: str) -> None:
    """Refuses infinities and NaNs in a concrete array; a traced one passes (metrics report it).

    Raises: InputError naming `where` and how many elements are not finite.
    """
    if isinstance(x, jax.core.Tracer):
        return
    with jax.ensure_compile_time_eval():  # a constant inside a traced function is concrete too
        bad = int(np.size(x)) - int(jnp.isfinite(x).sum())
    if bad:
        raise InputError(
            f"{where}: {bad} of {np.size(x)} elements are inf or nan; only finite weights have codes"
        )


def quantize(
    w: Float[Array, "..."],
    grid: Grid,
    reduced: tuple[int, ...],
    scale: Float[Array, "..."] | None = None,
    where: str = "array",
) -> QArray:
    """Returns the codes and scales of `w` on `grid`.

    With `scale` None the scales come from the weights, as the format says. A given scale is first rounded as it will be
    stored (to the grid's scale dtype; on a two-level grid to a product d * sc), and the codes are taken against that.

    Shapes: w [lead..., reduced..., trail...]; scale [lead..., Q, trail...].
    Raises: ValueError when the tile does not divide the reduced axes, or when a concrete `w` is not finite, or when a
        concrete scale leaves the range of its dtype.
    Exactness: jitted or not the result is the same; q4_0 and q8_0 equal ggml's bit for bit where the float32 scale is a
        normal number and its float16 is finite and not zero. Smaller tiles than that become zero tiles.
    """
    refuse_nonfinite(w, where)
    fmt = grid.number
    view = w.astype(jnp.float32).reshape(tiles.tiled_shape(w.shape, reduced, grid, where))
    axis = reduced[0] + 1
    if scale is None:
        raw = scales.from_weights(view, axis, grid)
        stored = scales.stored(raw, grid, reduced[0])
        against = raw if fmt.codes_against == "unrounded" else stored.astype(jnp.float32)
    else:
        stored = scales.stored(scale.astype(jnp.float32), grid, reduced[0])
        against = stored.astype(jnp.float32)
    refuse_nonfinite(stored, f"{where}: scales as {grid.scale_dtype}")
    codes = rounding.to_codes(view, jnp.expand_dims(against, axis), fmt)
    return QArray(codes=codes.reshape(w.shape), scale=stored, grid=grid, reduced=reduced)
