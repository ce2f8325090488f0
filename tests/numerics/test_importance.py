"""Searches that weigh errors: against brute force, against themselves without weights, and what weights mean."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_qat.numerics import FORMATS, Grid, QArray, mse_search, percentile_scale, quantize
from gemma_qat.numerics.importance import weights_of
from gemma_qat.numerics.scales import from_weights
from gemma_qat.numerics.search import refitted
from gemma_qat.numerics.tiles import tiled_shape

NAMES = tuple(FORMATS)


def _grid(name: str) -> Grid:
    return Grid(format=name, tile=FORMATS[name].tile or 32)


def _weights(seed: int = 0, rows: int = 512, outputs: int = 5) -> tuple[jax.Array, jax.Array]:
    """A matrix [R, O] with outliers and an importance [R] over four orders of magnitude."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((rows, outputs)) * np.exp(rng.standard_normal((rows, outputs)))
    importance = np.exp(2 * rng.standard_normal(rows))
    return jnp.asarray(w, jnp.float32), jnp.asarray(importance, jnp.float32)


def _errors(w: jax.Array, q: QArray, importance: jax.Array) -> np.ndarray:
    """Weighed squared error in float64 of each tile, or super-block where scales have two levels: [blocks, O]."""
    difference = np.asarray(q.dequantize(), np.float64) - np.asarray(w, np.float64)
    squares = difference**2 * np.asarray(importance, np.float64)[:, None]
    count = q.scale.shape[0] // q.grid.number.super_tiles
    return squares.reshape(count, -1, w.shape[1]).sum(1)


@pytest.mark.parametrize("name", NAMES)
def test_no_tile_weighs_more_than_without_weights(name: str) -> None:
    """If it fails, an importance makes what it weighs worse, or does nothing."""
    grid, (w, importance) = _grid(name), _weights()
    plain = quantize(w, grid, (0,), mse_search(w, grid, (0,)))
    weighed = quantize(w, grid, (0,), mse_search(w, grid, (0,), importance=importance))
    before, after = (_errors(w, q, importance) for q in (plain, weighed))
    assert (after <= before * (1 + 1e-5)).all()  # float32 sums of 32 to 256 squares
    assert after.sum() < 0.98 * before.sum()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [1.0, 3.7, 1e-12])
def test_equal_importance_changes_no_bit(name: str, value: float) -> None:
    """If it fails, a method with importance differs from the method for another reason than the importance."""
    grid, (w, _) = _grid(name), _weights(1)
    same = mse_search(w, grid, (0,), importance=jnp.full((512,), value))
    np.testing.assert_array_equal(same, mse_search(w, grid, (0,)))
    nothing = mse_search(w, grid, (0,), importance=jnp.zeros((512,)))
    np.testing.assert_array_equal(nothing, same)


@pytest.mark.parametrize("name", ["int2", "int4", "q4_0", "ternary"])
def test_the_scale_is_brute_forces(name: str) -> None:
    """If it fails, the least weighed error among the candidates is not what is found."""
    grid, (w, importance) = _grid(name), _weights(2, rows=32, outputs=3)
    found = mse_search(w, grid, (0,), importance=importance)
    base = from_weights(w.reshape(1, 32, 3), 1, grid)
    reach = 2.0 if name == "ternary" else 1.0
    fractions = np.append(reach * np.linspace(0.1, 1.2, 100), 1.0)
    if name == "q4_0":
        fractions = np.concatenate([fractions, -fractions])
    fmt = grid.number
    for output in range(3):
        losses = []
        for fraction in fractions.astype(np.float32):
            scale = float((base[0, output] * fraction).astype(grid.scale_dtype))
            x = np.asarray(w[:, output], np.float64)
            codes = np.clip(np.rint(x / scale), fmt.lowest, fmt.highest)
            losses.append(
                float(np.sum(np.asarray(importance, np.float64) * (codes * scale - x) ** 2))
            )
        scale = float(found[0, output])
        x = np.asarray(w[:, output], np.float64)
        codes = np.clip(np.rint(x / scale), fmt.lowest, fmt.highest)
        own = float(np.sum(np.asarray(importance, np.float64) * (codes * scale - x) ** 2))
        assert own <= min(losses) * (1 + 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_refitted_tiles_weigh_no_more_than_the_extremums(name: str) -> None:
    """If it fails, rounding to nearest with importance is worse than without, by its own measure."""
    grid, (w, importance) = _grid(name), _weights(3)
    before = _errors(w, quantize(w, grid, (0,)), importance)
    after = _errors(w, refitted(w, grid, (0,), importance), importance)
    assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() < before.sum()


def test_the_fit_by_hand() -> None:
    """Codes 1, 3 and 7 of 0.9, 3.2 and 7: the scale is sum(i c w) / sum(i c^2)."""
    w = jnp.asarray([[0.9], [3.2], [7.0]])
    q = refitted(w, Grid(format="int4", divisor=7.0), (0,), jnp.asarray([1.0, 2.0, 0.25]))
    assert q.codes[:, 0].tolist() == [1, 3, 7]
    expected = (0.9 + 2 * 3 * 3.2 + 0.25 * 49) / (1 + 2 * 9 + 0.25 * 49)
    np.testing.assert_allclose(q.scale[0, 0], expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["int4", "q4_0", "q6_k"])
def test_percentiles_count_what_matters(name: str) -> None:
    """If it fails, an equal importance moves a percentile, or one of 0 still counts."""
    grid, (w, _) = _grid(name), _weights(4)
    plain = percentile_scale(w, grid, (0,), 97)
    equal = percentile_scale(w, grid, (0,), 97, importance=jnp.full((512,), 5.0))
    # Interpolated in another order: up to a step of the stored type, or of an int8 of the super-block's largest.
    step = jnp.max(jnp.abs(plain)) / 127 if grid.two_level else jnp.abs(plain) * 2**-10
    assert bool((jnp.abs(equal - plain) <= step).all())


def test_the_weighed_median_by_hand() -> None:
    """Gaps weigh 2, 1.5 and 1 of 4.5: half of it from the top is a quarter of the way down the gap from 8 to 4."""
    w, importance = jnp.asarray([[4.0], [-2.0], [16.0], [8.0]]), jnp.asarray([2.0, 2.0, 1.0, 1.0])
    found = percentile_scale(w, Grid(format="int4"), (0,), 50, importance=importance)
    expected = 8 - 4 * (2.25 - 1.0) / 1.5
    np.testing.assert_allclose(float(found[0, 0]) * 8, expected, rtol=1e-6)
    last = percentile_scale(w, Grid(format="int4"), (0,), 100, importance=importance)
    assert float(last[0, 0]) * 8 == 16


def test_experts_and_merged_axes_have_their_own_weights() -> None:
    """If it fails, an expert is weighed by another's tokens, or a head by another head's."""
    rng = np.random.default_rng(5)
    w = jnp.asarray(rng.standard_normal((3, 64, 7)), jnp.float32)
    importance = jnp.asarray(np.exp(2 * rng.standard_normal((3, 64))), jnp.float32)
    grid = Grid(format="int4", tile=32)
    together = mse_search(w, grid, (1,), importance=importance)
    for expert in range(3):
        alone = mse_search(w[expert], grid, (0,), importance=importance[expert])
        np.testing.assert_array_equal(together[expert], alone)
    heads = w.reshape(3, 8, 8, 7)
    merged = mse_search(heads[0], grid, (0, 1), importance=importance[0].reshape(8, 8))
    np.testing.assert_array_equal(merged, together[0])
    with pytest.raises(ValueError, match="w: importance of shape"):
        weights_of(importance[:2], w.shape, (1,), grid, "w")
    assert weights_of(importance, w.shape, (1,), grid).ndim == len(tiled_shape(w.shape, (1,), grid))
