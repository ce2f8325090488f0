"""GPTQ is the algorithm of its paper, on our grids and scales, whatever the block, the order, or the tile."""

import jax.numpy as jnp
import numpy as np
import pytest

from gemma_qat.numerics import Grid
from gemma_qat.ptq import PtqConfig
from gemma_qat.ptq.gptq import gptq, gptq_codes
from gemma_qat.ptq.layer import Seen
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
QUICK = [
    ("q4_0", True),
    ("q4_0", False),
    ("q6_k", True),
    ("int2_no_zero", True),
    ("ternary", False),
]
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


@pytest.mark.parametrize(
    ("name", "act_order"),
    [
        pytest.param(name, act_order, marks=() if (name, act_order) in QUICK else pytest.mark.slow)
        for name in GRIDS
        for act_order in (True, False)
    ],
)
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


def _loss(w, q, h):
    """tr(d^T H d) in float64, of each group."""
    d = (np.asarray(q.dequantize(), np.float64) - w).reshape(-1, *w.shape[-2:])
    return np.einsum("gro,grs,gso->g", d, h.reshape(-1, *h.shape[-2:]).astype(np.float64), d)


@pytest.mark.parametrize(
    "name",
    [
        "q4_0",
        *(
            pytest.param(n, marks=pytest.mark.slow)
            for n in ("int4 channel", "int2 channel", "ternary")
        ),
    ],
)
def test_no_group_loses_by_it(name):
    """If it fails, GPTQ is worse than the rounding to nearest on the same scales that it starts from."""
    grid, rng = GRIDS[name], np.random.default_rng(5)
    w = rng.normal(size=(3, 64, 8)).astype(np.float32)
    h = np.stack([_inputs(seed, 64) for seed in range(3)])
    seen = Seen(moments=jnp.asarray(h), tokens=jnp.full(3, 600.0))
    found, notes = gptq(jnp.asarray(w), grid, (1,), seen, PtqConfig())
    nearest = ROUNDINGS["mse"](jnp.asarray(w), grid, (1,))
    np.testing.assert_array_equal(found.scale, nearest.scale)
    assert notes == ()
    assert (_loss(w, found, h) < 0.9 * _loss(w, nearest, h)).all()


def test_a_table_is_a_matrix_the_other_way_round_and_experts_are_matrices():
    """If it fails, axes are mixed up where moments are shared by leading axes, or where each has its own."""
    grid, rng = GRIDS["q4_0"], np.random.default_rng(5)
    w = jnp.asarray(rng.normal(size=(3, 64, 8)), jnp.float32)
    h = jnp.asarray([_inputs(seed, 64) for seed in range(3)])
    scale = ROUNDINGS["mse"](w, grid, (1,)).scale
    experts = gptq_codes(w, h, scale, grid, (1,), 0.01)[0]
    alone = gptq_codes(w[1], h[1], scale[1], grid, (0,), 0.01)[0]
    table = gptq_codes(w[1].T, h[1], scale[1].T, grid, (1,), 0.01)[0]
    np.testing.assert_array_equal(experts[1], alone)
    np.testing.assert_array_equal(table.T, alone)


def test_inputs_that_are_never_there_are_rounded_to_nearest():
    """If it fails, a dead input divides by zero, or its weights are lost for text that does use it."""
    grid, rng = GRIDS["int4 channel"], np.random.default_rng(6)
    w = jnp.asarray(rng.normal(size=(64, 4)), jnp.float32)
    h = _inputs(7, 64)
    h[10:13] = h[:, 10:13] = 0.0
    seen = Seen(moments=jnp.asarray(h), tokens=jnp.asarray(600.0))
    found, _ = gptq(w, grid, (0,), seen, PtqConfig())
    nearest = ROUNDINGS["mse"](w, grid, (0,))
    np.testing.assert_array_equal(found.codes[10:13], nearest.codes[10:13])
    assert (found.codes != nearest.codes).any()
    silent = Seen(moments=jnp.zeros((64, 64)), tokens=jnp.asarray(0.0))
    np.testing.assert_array_equal(gptq(w, grid, (0,), silent, PtqConfig())[0].codes, nearest.codes)


def test_damping_grows_until_there_is_a_factor_and_says_so():
    """If it fails, moments that rounding left indefinite make codes of nan, or nobody hears of the damping."""
    grid, rng = GRIDS["int4 channel"], np.random.default_rng(8)
    w = jnp.asarray(rng.normal(size=(64, 4)), jnp.float32)
    h = _inputs(9, 64).astype(np.float64)
    h /= np.sqrt(np.outer(np.diag(h), np.diag(h)))  # a diagonal of ones
    values, vectors = np.linalg.eigh(h)
    h -= (values[0] + 0.1) * np.outer(vectors[:, 0], vectors[:, 0])  # lowest eigenvalue -0.1
    assert (np.diag(h) > 0).all()
    seen = Seen(moments=jnp.asarray(h, jnp.float32), tokens=jnp.asarray(600.0))
    found, notes = gptq(w, grid, (0,), seen, PtqConfig())
    (note,) = notes
    assert "damping raised to" in note
    # Doubled until the lowest eigenvalue is lifted above 0, and no further.
    needed = -np.linalg.eigvalsh(h)[0] / np.diag(h).mean()
    used = float(note.split("raised to ")[1].split()[0])
    assert used / 2 < needed < used
    assert len(np.unique(found.codes)) > 8
