"""Calibration against brute force: if these fail, static scales are not where their method says."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_qat.errors import InputError
from gemma_qat.quant.observe import CALIBRATIONS, EDGES, Seen, scale_of, summarize

RNG = np.random.default_rng(7)
BATCHES = [(RNG.standard_normal((64, 257)) * scale).astype(np.float32) for scale in (1.0, 1.5, 1.1)]
BATCHES[1][3, 5] = 40.0  # an outlier that absmax keeps and least squares drops
BIN = 2 ** (1 / 32)  # ratio of neighbouring edges: how finely a histogram can tell magnitudes apart


def _seen() -> Seen:
    seen, summary = Seen(), jax.jit(summarize)
    for batch in BATCHES:
        seen.add(summary(batch), "here")
    return seen


def test_a_histogram_holds_every_element_once() -> None:
    seen = _seen()
    assert seen.histogram.sum() == sum(batch.size for batch in BATCHES)
    magnitudes = np.abs(np.concatenate(BATCHES))
    counts, _ = np.histogram(magnitudes, EDGES)
    # float32 log2 may put an element that lies on an edge one bin away.
    assert np.abs(np.cumsum(seen.histogram) - np.cumsum(counts)).max() <= 3
    np.testing.assert_allclose(seen.largest, [np.abs(batch).max() for batch in BATCHES], rtol=0)


def test_max_ema_and_percentile() -> None:
    tops = [float(np.abs(batch).max()) for batch in BATCHES]
    assert float(scale_of(_seen(), "max", 127, "x")[0]) == np.float32(tops[1] / 127)
    average = 0.9 * (0.9 * tops[0] + 0.1 * tops[1]) + 0.1 * tops[2]
    np.testing.assert_allclose(scale_of(_seen(), "ema", 127, "x"), [average / 127], rtol=1e-6)
    exact = np.percentile(np.abs(np.concatenate(BATCHES)), 99.99)
    found = float(scale_of(_seen(), "percentile", 127, "x")[0]) * 127
    assert exact / BIN**2 <= found <= exact * BIN**2


@pytest.mark.parametrize("highest", [7, 127])
def test_least_squares_is_near_the_best_of_a_fine_search(highest: int) -> None:
    x = np.concatenate(BATCHES).astype(np.float64)

    def error(scale: float) -> float:
        values = np.clip(np.round(x / scale), -highest - 1, highest) * scale
        return float(np.mean((values - x) ** 2))

    best = min(error(bound / highest) for bound in np.geomspace(0.5, 41, 400))
    found = error(float(scale_of(_seen(), "mse", highest, "x")[0]))
    assert best <= found <= 1.05 * best  # 2 % bins and the uniform-error model
    assert found < 0.9 * error(40.0 / highest)  # the outlier is given up


@pytest.mark.parametrize("method", CALIBRATIONS)
def test_no_data_and_bad_data_are_one_line(method: str) -> None:
    """If it fails, a site without data gets a made-up scale, or a nan one."""
    with pytest.raises(InputError, match="layers/0/x: saw no data"):
        scale_of(Seen(), method, 127, "layers/0/x")
    zeros = Seen()
    zeros.add(summarize(jnp.zeros((2, 3))), "z")
    with pytest.raises(InputError, match="saw no data"):
        scale_of(zeros, method, 127, "z")
    with pytest.raises(InputError, match="layers/1/y: calibration data made inf here"):
        Seen().add(summarize(jnp.asarray([[1.0, np.inf]])), "layers/1/y")


@pytest.mark.parametrize("method", CALIBRATIONS)
def test_large_magnitudes_are_not_clipped(method: str) -> None:
    """Gemma's residual reaches thousands; beyond the last bin there is an error, not a guess."""
    seen = Seen()
    seen.add(summarize(jnp.full((64, 3), 3e5)), "x")
    np.testing.assert_allclose(scale_of(seen, method, 127, "x"), [3e5 / 127], rtol=BIN - 1)
    with pytest.raises(
        InputError, match=r"layers/1/y: calibration data made 2e\+12 here, less than 2\^40"
    ):
        seen.add(summarize(jnp.full((2, 3), 2e12)), "layers/1/y")
    with pytest.raises(InputError, match="smaller or shorter batches"):
        jax.eval_shape(summarize, jax.ShapeDtypeStruct((2**16, 2**16), jnp.float32))


def test_what_is_not_valid_is_not_counted() -> None:
    x = np.stack([BATCHES[0][:4], 100 * BATCHES[0][:4]])
    marked = summarize(jnp.asarray(x), jnp.asarray([[True] * 4, [False] * 4]))
    alone = summarize(jnp.asarray(x[0]))
    np.testing.assert_array_equal(marked["histogram"], alone["histogram"])
    assert marked["largest"] == alone["largest"]
