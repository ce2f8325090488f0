"""GPTQ is the algorithm of its paper, on our grids and scales, whatever the block, the order, or the tile."""

import jax.numpy as jnp
import numpy as np
import pytest

from gemma_qat.numerics import Grid
from gemma_qat.ptq.gptq import gptq_codes
from gemma_qat.ptq.rtn import ROUNDINGS

GRIDS = {
    "q4_0": Grid(format="q4_0"),
    "int4 tile 16": Grid(format="int4", tile=16),
    "int4 channel": Grid(format="int4"),
    "int8 channel": Grid(format="int8"),
    "q6_k": Grid(format="q6_k"),
    "q8_0": Grid(format="q8_0"),
    "int2 channel": Grid(format="int2"),
    "int2_no_zero": Grid(format="int2_no_zero", tile=32),
    "ternary": Grid(format="ternary", tile=64),
}
ROWS = {"q6_k": 256}  # a super-block
OUTPUTS = 6


def _inputs(seed, width, rows=600):
    """Inputs that are correlated and differ in size, as those of a network do."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(rows, width // 4)) @ rng.normal(size=(width // 4, width))
    x = (0.3 * mixed + rng.normal(size=(rows, width))) * np.exp(rng.normal(size=width))
    return (x.T @ x / rows).astype(np.float32)


def _one_by_one(w, h, scale, grid, damping, act_order):
    """Algorithm 1 of arXiv 2210.17323 in float64: element by element, no blocks, no factor but the inverse itself.

    After a row is rounded it leaves the problem, which on the inverse is a step of Gaussian elimination.
    """
    fmt = grid.number
    w, h = w.astype(np.float64).copy(), h.astype(np.float64)
    h = h + np.diag(
        np.where(np.diag(h) > 0, damping, 1 + damping) * np.diag(h)[np.diag(h) > 0].mean()
    )
    inverse = np.linalg.inv(h)
    order = np.argsort(-np.diag(h), kind="stable") if act_order else np.arange(len(h))
    tile = len(h) // len(scale)
    codes, margin = np.zeros(w.shape, np.int64), np.zeros(w.shape)
    left = list(order)
    while left:
        i = left.pop(0)
        for o in range(w.shape[1]):
            s = float(scale[i // tile, o])
            level = w[i, o] / s + fmt.zero if s else float(fmt.zero_code)
            nearest = {
                "up": np.floor(level + 0.5),
                "away": np.trunc(level + np.copysign(0.5, level)),
            }
            codes[i, o] = np.clip(
                nearest.get(fmt.ties, np.round(level)), fmt.code_min, fmt.code_max
            )
            margin[i, o] = abs(level - np.floor(level) - 0.5)
            error = (w[i, o] - (codes[i, o] - fmt.zero) * s) / inverse[i, i]
            w[left, o] -= error * inverse[i, left]
        inverse = inverse - np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return codes, margin


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("name", GRIDS)
def test_codes_are_those_of_the_naive_algorithm(name, act_order):
    """If it fails, what is called GPTQ is something else: wrong order, wrong scale of a row, or a block not told.

    Float32 decides otherwise where float64 is within a rounding error of a tie, and what follows may then differ too:
    columns (there are 6) in which no level comes close to a tie have to be equal, code for code, and 5 of 6 are such.
    """
    grid, rng, width = GRIDS[name], np.random.default_rng(3), ROWS.get(name, 64)
    w = rng.normal(size=(width, OUTPUTS)).astype(np.float32)
    h = _inputs(4, width)
    scale = ROUNDINGS["mse"](jnp.asarray(w), grid, (0,)).scale
    given = (jnp.asarray(w), jnp.asarray(h), scale, grid, (0,), 0.01, act_order)
    found, used = gptq_codes(*given, block=24)
    expected, margin = _one_by_one(w, h, np.asarray(scale, np.float64), grid, 0.01, act_order)
    differs = np.asarray(found) != expected
    assert float(used[0]) == pytest.approx(0.01)
    # The first code of a column that differs is one that float64 found next to a tie.
    order = np.argsort(-np.diag(h), kind="stable") if act_order else np.arange(width)
    for o in np.flatnonzero(differs.any(0)):
        first = order[np.flatnonzero(differs[order, o])[0]]
        assert margin[first, o] < 2e-3, (o, margin[first, o])
    assert differs.any(0).sum() <= 1
