"""What is watched besides the loss: how the codes move, and how fast the run is.

    flipped       share of codes that differ from those at the last report
    clipped       share of weights whose code saturates
    scale_drift   mean of |ln |s / s_then|| over scales, since the last report

They are computed by one jitted program when a report is due, from the masters, and cost a step nothing. What is kept
between reports is one int8 code a weight, sharded like the weight, and the scales.

Units: tokens/s counts targets; model FLOPs are those of the mathematics (three times the forward pass, no
rematerialization), as in PaLM's definition of model FLOPs utilization (arXiv 2204.02311, appendix B).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gemma_qat.models import stacked_sites
from gemma_qat.models.ahead import mastered
from gemma_qat.numerics import QArray
from gemma_qat.numerics.rounding import unclipped
from gemma_qat.numerics.tiles import tiled_shape
from gemma_qat.quant.fake import on_grid
from gemma_qat.quant.sites import scale_path
from gemma_qat.train.state import Student

Grids = dict[str, QArray]
"""Codes and scales of every planned site, by in-memory path."""


def grids_of(parameters: Mapping[str, jax.Array], student: Student) -> Grids:
    """Returns the codes and scales that training sees for these masters; looked-up tables included."""
    out: Grids = {}
    for path, site in stacked_sites(student.config, student.plans).items():
        if site.plan is not None:
            scale = parameters.get(scale_path(path))
            _, out[path] = on_grid(mastered(path, parameters), scale, site.plan, site.reduced)
    return out


@dataclasses.dataclass(frozen=True)
class GridWatch:
    """Compares the codes of one report with those of the next."""

    student: Student

    def look(
        self, parameters: Mapping[str, jax.Array], before: Grids | None
    ) -> tuple[Grids, dict[str, jax.Array]]:
        """Returns (codes and scales now, the metrics above; those that need a `before` only where there is one)."""
        if not self.student.plans:
            return {}, {}
        return self._look(dict(parameters), before)

    @functools.cached_property
    def _look(self) -> Any:
        def look(parameters: dict[str, jax.Array], before: Grids | None) -> Any:
            now = grids_of(parameters, self.student)
            clipped = [saturated(mastered(p, parameters), q) for p, q in now.items()]
            found = {"clipped": _mean(clipped)}
            if before is not None:
                flips = [(now[p].codes != before[p].codes) for p in now]
                found["flipped"] = _mean(flips)
                found["scale_drift"] = _mean([_drift(now[p].scale, before[p].scale) for p in now])
            return now, found

        return jax.jit(look)


def _mean(parts: list[jax.Array]) -> jax.Array:
    total = sum(part.size for part in parts)
    return jnp.sum(jnp.stack([jnp.sum(part, dtype=jnp.float32) for part in parts])) / total


def saturated(w: jax.Array, q: QArray) -> jax.Array:
    """Returns where codes saturate, bool in the tiled view [lead..., Q, tile, trail...]."""
    axis = q.reduced[0] + 1
    view = w.astype(jnp.float32).reshape(tiled_shape(w.shape, q.reduced, q.grid))
    number = q.grid.number
    raw = unclipped(view, jnp.expand_dims(q.scale.astype(jnp.float32), axis), number)
    return (raw < number.code_min) | (raw > number.code_max)


def _drift(now: jax.Array, before: jax.Array) -> jax.Array:
    a, b = jnp.abs(now.astype(jnp.float32)), jnp.abs(before.astype(jnp.float32))
    both = (a > 0) & (b > 0)
    return jnp.where(both, jnp.abs(jnp.log(jnp.where(both, a, 1.0) / jnp.where(both, b, 1.0))), 0.0)
