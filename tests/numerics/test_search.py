"""Scales by percentile and by LSQ's rule: by hand, against numpy, on every format and at both ends."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_qat.numerics import FORMATS, Grid, lsq_scale, mse_search, percentile_scale, quantize
from gemma_qat.numerics.scales import stored

NAMES = tuple(FORMATS)


def _grid(name: str) -> Grid:
    return Grid(format=name, tile=FORMATS[name].tile or 32)


def _weights() -> np.ndarray:
    """Magnitudes of all sizes, so that extrema of both signs occur, and a row of zeros."""
    rng = np.random.default_rng(101)
    w = rng.standard_normal((24, 512)) * np.exp(rng.standard_normal((24, 512)))
    w[7] = 0
    return w.astype(np.float32)


@pytest.mark.parametrize("name", NAMES)
def test_percentiles_are_numpys(name: str) -> None:
    """If it fails, learned scales start elsewhere than their name says."""
    grid, w = _grid(name), _weights()
    found = percentile_scale(jnp.asarray(w), grid, (1,), 90)
    assert found.dtype == jnp.float32
    tiles = w.reshape(24, -1, grid.tile or 0)
    raw = np.percentile(np.abs(tiles), 90, axis=2) / abs(grid.divisor)
    extremum = np.take_along_axis(tiles, np.abs(tiles).argmax(2)[..., None], axis=2)[..., 0]
    if grid.divisor < 0:
        raw = np.copysign(raw, -extremum)
    expected = np.array(stored(jnp.asarray(raw, jnp.float32), grid, 1), np.float32)
    expected[7] = FORMATS[name].empty_scale
    # Interpolation in float32 and in float64: one step of the stored type, or of an int8 of the super-block's largest.
    step = (
        np.abs(expected).max(1, keepdims=True) / 127
        if grid.two_level
        else np.abs(expected) * 2**-10
    )
    assert (np.abs(np.asarray(found) - expected) <= 1.001 * step).all()
    np.testing.assert_array_equal(found, stored(found, grid, 1).astype(jnp.float32))
    jitted = jax.jit(lambda x: percentile_scale(x, grid, (1,), 90))(jnp.asarray(w))
    np.testing.assert_array_equal(found, jitted)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "ternary"])
def test_the_hundredth_percentile_is_the_extremum(name: str) -> None:
    """If it fails, a percentile is not counted from the smallest magnitude to the largest."""
    grid, w = _grid(name), jnp.asarray(_weights())
    plain = quantize(w, grid, (1,)).scale.astype(jnp.float32)
    found = percentile_scale(w, grid, (1,), 100)
    # q8_0 divides by 127 where the percentile multiplies: one float32 step before float16, which may fall on its edge.
    np.testing.assert_allclose(found, plain, rtol=2**-10 if name == "q8_0" else 0)


def test_by_hand_between_two_elements() -> None:
    w = jnp.asarray([[0.0, -8.0, 16.0, 24.0, -32.0]])
    found = [float(percentile_scale(w, Grid(format="int4"), (1,), p)[0, 0]) for p in (25, 50, 90)]
    assert found == [1.0, 2.0, float(np.float32(28.8 / 8))]
    one = jnp.asarray([[3.0]])
    assert float(percentile_scale(one, Grid(format="int4"), (1,), 50)[0, 0]) == 3 / 8


def test_tiles_of_mostly_zeros_keep_their_extremum() -> None:
    """If it fails, a lone weight is divided by the scale of an empty tile."""
    w = np.zeros((1, 32), np.float32)
    w[0, 4] = -4.0
    for name in ("int4", "q4_0"):
        grid = _grid(name)
        assert float(percentile_scale(jnp.asarray(w), grid, (1,), 50)[0, 0]) == 0.5


def test_an_outlier_costs_less() -> None:
    """If it fails, a percentile start is no better than absmax where it should be."""
    w = np.random.default_rng(103).standard_normal((16, 1024)).astype(np.float32)
    w[:, 9] = 40.0
    grid = Grid(format="int4")

    def error(scale: jax.Array | None) -> float:
        values = quantize(jnp.asarray(w), grid, (1,), scale).dequantize()
        return float(np.sum(np.square(np.delete(np.asarray(values) - w, 9, axis=1))))

    assert error(percentile_scale(jnp.asarray(w), grid, (1,), 99)) < 0.1 * error(None)


def test_ternary_searches_beyond_the_mean() -> None:
    """The best step for normal weights is 1.53 times their mean magnitude; a search that ends at 1.2 cannot find it."""
    w = jnp.asarray(np.random.default_rng(107).standard_normal((8, 4096)), jnp.float32)
    grid = Grid(format="ternary")
    ratio = mse_search(w, grid, (1,)) / quantize(w, grid, (1,)).scale
    np.testing.assert_allclose(ratio, 1.53, atol=0.06)  # steps of 0.022, and samples of 4096


@pytest.mark.parametrize("percentile", [0, -1, 100.5, float("nan")])
def test_percentiles_out_of_range(percentile: float) -> None:
    with pytest.raises(ValueError, match="above 0 and at most 100"):
        percentile_scale(jnp.ones((1, 32)), Grid(format="int4"), (1,), percentile)


@pytest.mark.parametrize("name", NAMES)
def test_lsq_starts_at_twice_the_mean_over_the_root_of_the_highest(name: str) -> None:
    """If it fails, a study of LSQ does not begin where the paper does, or a grid with a sign begins upside down."""
    grid, w = _grid(name), _weights()
    found = lsq_scale(jnp.asarray(w), grid, (1,))
    tiles = w.astype(np.float64).reshape(24, -1, grid.tile or 0)
    highest = {
        "int2": 1, "int2_no_zero": 1.5, "ternary": 1, "int4": 7, "int8": 127, "q4_0": 7, "q6_k": 31, "q8_0": 127,
    }[name]  # fmt: skip
    raw = 2 * np.abs(tiles).mean(2) / np.sqrt(highest)
    extremum = np.take_along_axis(tiles, np.abs(tiles).argmax(2)[..., None], axis=2)[..., 0]
    if name in ("q4_0", "q6_k"):
        raw = np.copysign(raw, -extremum)
    expected = np.array(stored(jnp.asarray(raw, jnp.float32), grid, 1), np.float32)
    expected[7] = FORMATS[name].empty_scale
    # Sums in float32 and in float64: one step of the stored type, or of an int8 of the super-block's largest.
    step = (
        np.abs(expected).max(1, keepdims=True) / 127
        if grid.two_level
        else np.abs(expected) * 2**-10
    )
    assert found.dtype == jnp.float32
    assert (np.abs(np.asarray(found) - expected) <= 1.001 * step).all()
    np.testing.assert_array_equal(found, stored(found, grid, 1).astype(jnp.float32))
    jitted = jax.jit(lambda x: lsq_scale(x, grid, (1,)))(jnp.asarray(w))
    np.testing.assert_array_equal(found, jitted)


def test_lsq_by_hand() -> None:
    w = jnp.asarray([[0.0, -8.0, 16.0, 24.0, -32.0]])
    found = float(lsq_scale(w, Grid(format="int2"), (1,))[0, 0])
    assert found == pytest.approx(2 * 80 / 5, rel=1e-6)
    found = float(lsq_scale(w, Grid(format="int4"), (1,))[0, 0])
    assert found == pytest.approx(2 * 80 / 5 / 7**0.5, rel=1e-6)
