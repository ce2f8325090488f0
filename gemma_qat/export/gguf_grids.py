"""Grids that ggml has no blocks for, as blocks whose scale is repeated: weights only.

| grid | blocks | code |
|---|---|---|
| int2, ternary | Q2_0, or Q4_0 where 64 does not divide a row or tile | as it is, or code + 8 |
| int4 | Q4_0 | code + 8 |
| int8 | Q8_0 | as it is |

A channel's, row's or larger tile's scale becomes that of every block in it. Codes are exact. ggml's scales are float16:
a float32 or bfloat16 scale that is no float16 is rounded to one, by at most 2^-11 of itself, and counted; scales that
float16 cannot hold that well (beyond 65504, or below 2^-14 and not among its subnormals) are refused. What a recipe
rounds beside its weights with static scales has no place in the format at all.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from gemma_qat.errors import InputError
from gemma_qat.export.artifact import Artifact
from gemma_qat.export.gguf_blocks import BLOCKS, on_host
from gemma_qat.models import declare, static_scale_paths
from gemma_qat.numerics import Grid, QArray
from gemma_qat.numerics.tiles import split_axes
from gemma_qat.quant.plan import Plan, weight_only
from gemma_qat.quant.sites import Parameter

_SMALLEST = float(np.finfo(np.float16).smallest_normal)

_FORMS: dict[str, tuple[tuple[Grid, int], ...]] = {
    "int2": ((Grid(format="int2", tile=64, scale_dtype="float16"), 0), (Grid(format="q4_0"), 8)),
    "ternary": ((Grid(format="int2", tile=64, scale_dtype="float16"), 0), (Grid(format="q4_0"), 8)),
    "int4": ((Grid(format="q4_0"), 8),),
    "int8": ((Grid(format="q8_0"), 0),),
}
"""By format: the grids of ggml that hold its values, best first, and what is added to a code."""


def ggml_grid(grid: Grid, parameter: Parameter) -> Grid | None:
    """Returns the grid of ggml's blocks that holds a parameter's codes, or None where there is none."""
    return _form(grid, parameter)[0]


def _form(grid: Grid, parameter: Parameter) -> tuple[Grid | None, int]:
    length = split_axes(parameter.shape, parameter.reduced)[1]
    if grid in BLOCKS:
        return (None if length % BLOCKS[grid].elements else grid), 0
    for form, shift in _FORMS.get(grid.format, ()):
        if (grid.tile or length) % BLOCKS[form].elements == 0 and length % (
            grid.tile or length
        ) == 0:
            return form, shift
    return None, 0


def as_blocks(q: QArray, parameter: Parameter) -> tuple[QArray, int]:
    """Returns codes and scales on the grid `ggml_grid` names, and how many scales had to be rounded.

    Raises: InputError naming the parameter and a scale that float16 cannot hold.
    Exactness: codes stand for the same multiples of the scale; a scale is the nearest float16.
    """
    form, shift = _form(q.grid, parameter)
    if form is None:
        raise InputError(f"{parameter.path}: {q.grid} has no form among ggml's blocks")
    if form == q.grid:
        return q, 0
    scale, rounded = _halves(np.asarray(q.scale, np.float32), parameter.path)
    axis, length = q.reduced[0], split_axes(parameter.shape, parameter.reduced)[1]
    repeats = length // BLOCKS[form].elements // scale.shape[axis]
    codes: Any = np.asarray(q.codes) + np.int8(shift) if shift else q.codes
    spread = np.repeat(scale, repeats, axis=axis)
    spread_q = dataclasses.replace(q, codes=on_host(codes), scale=on_host(spread), grid=form)
    return spread_q, rounded


def _halves(scale: np.ndarray, path: str) -> tuple[np.ndarray, int]:
    with np.errstate(over="ignore"):
        half = scale.astype(np.float16)
    differs = half.astype(np.float32) != scale
    bad = differs & ~((np.abs(scale) >= _SMALLEST) & np.isfinite(half))
    if bad.any():
        worst = float(scale[bad][0])
        raise InputError(
            f"{path}: a scale of {worst:g}, which float16 cannot hold ({bad.sum()} of {bad.size})"
        )
    return half, int(differs.sum())


def on_blocks(artifact: Artifact) -> Artifact:
    """Returns an artifact as its GGUF file holds it: on ggml's grids, static scales and what needs them left out."""
    declared, statics = declare(artifact.config), set(static_scale_paths(artifact.plans))
    codes = {path: as_blocks(q, declared[path])[0] for path, q in artifact.quantized.items()}
    plans = {
        path: dataclasses.replace(_carried(plan), weight=codes[path].grid)
        for path, plan in artifact.plans.items()
    }
    floats = {path: x for path, x in artifact.floats.items() if path not in statics}
    return dataclasses.replace(artifact, plans=plans, quantized=codes, floats=floats)


def _carried(plan: Plan) -> Plan:
    """A plan without the roundings that llama.cpp does not do by itself."""
    by_itself = all(how.per == "tile" for how in plan.activations.values())
    return plan if by_itself else weight_only(plan)
