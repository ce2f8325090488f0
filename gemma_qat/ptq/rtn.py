"""Rounding to nearest: the post-training baselines that need no data.

`rtn` takes each tile's scale from its extremum; `mse` searches, tile by tile, for the scale with the least
squared error; `percentile` lets the largest 0.1 % of a tile's weights saturate; `lsq` is where LSQ starts learned
scales, from the mean magnitude, and meant for that. Each but `lsq` takes an importance of the inputs
(`numerics/importance.py`): `rtn` then fits the scale to the codes that the extremum gave, `mse` searches for the least
weighed error, `percentile` counts by weight.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax

from gemma_qat.errors import unknown
from gemma_qat.models.declare import declare
from gemma_qat.models.fit import Fitted
from gemma_qat.numerics import (
    Grid,
    QArray,
    lsq_scale,
    mse_search,
    percentile_scale,
    quantize,
    refitted,
    refuse_nonfinite,
)
from gemma_qat.ptq.config import PtqConfig
from gemma_qat.ptq.layer import Reduced, Seen, SiteMethod


@functools.partial(jax.jit, static_argnums=(1, 2))
def _extremum(w: jax.Array, grid: Grid, reduced: Reduced, importance: Any = None) -> QArray:
    return (
        quantize(w, grid, reduced) if importance is None else refitted(w, grid, reduced, importance)
    )


@functools.partial(jax.jit, static_argnums=(1, 2))
def _least_squares(w: jax.Array, grid: Grid, reduced: Reduced, importance: Any = None) -> QArray:
    return quantize(w, grid, reduced, mse_search(w, grid, reduced, importance=importance))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _percentile(w: jax.Array, grid: Grid, reduced: Reduced, importance: Any = None) -> QArray:
    return quantize(w, grid, reduced, percentile_scale(w, grid, reduced, importance=importance))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _step_size(w: jax.Array, grid: Grid, reduced: Reduced, importance: Any = None) -> QArray:
    del importance
    return quantize(w, grid, reduced, lsq_scale(w, grid, reduced))


ROUNDINGS: dict[str, Callable[..., QArray]] = {
    "rtn": _extremum,
    "mse": _least_squares,
    "percentile": _percentile,
    "lsq": _step_size,
}
"""(weight, grid, reduced axes, importance [R] or [E, R] or None) -> codes and scales."""


def rounding(name: str) -> SiteMethod:
    """Returns a rounding as a method of sites: weighed by the inputs' mean squares where they are known."""

    def site(
        w: jax.Array, grid: Grid, reduced: Reduced, seen: Seen | None, config: PtqConfig
    ) -> tuple[QArray, tuple[str, ...]]:
        return ROUNDINGS[name](w, grid, reduced, None if seen is None else seen.importance), ()

    return site


def round_to_nearest(
    parameters: Mapping[str, Any],
    fitted: Fitted,
    method: str = "rtn",
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, QArray]:
    """Returns the codes and scales of every planned site, one site at a time.

    Raises: InputError for an unknown method, or naming a site whose weights are not finite.
    """
    if method not in ROUNDINGS:
        raise unknown("PTQ method", method, ROUNDINGS)
    declared, out = declare(fitted.config), {}
    for done, (path, plan) in enumerate(fitted.plans.items()):
        refuse_nonfinite(parameters[path], path)
        q = ROUNDINGS[method](parameters[path], plan.weight, declared[path].reduced)
        refuse_nonfinite(q.scale, f"{path}: scales as {plan.weight.scale_dtype}")
        out[path] = q
        if progress:
            progress(f"ptq {method}", done + 1, len(fitted.plans))
    return out
