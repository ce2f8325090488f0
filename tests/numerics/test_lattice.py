"""Scales and codes found again behind bfloat16 weights that were on the q4_0 grid."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_qat.numerics import Grid, QArray, quantize
from gemma_qat.numerics.lattice import LEVELS, recover, returned

GRID = Grid(format="q4_0")
SHAPES = {"linear": ((256, 48), (0,)), "table": ((40, 96), (1,)), "experts": ((3, 64, 16), (1,)), "merged": ((4, 16, 24), (0, 1))}  # fmt: skip


def released(shape: tuple[int, ...], reduced: tuple[int, ...], draw: str = "normal") -> QArray:
    """Codes and scales of random weights, as a trainer has them."""
    w = getattr(jax.random, draw)(jax.random.key(len(shape)), shape) * 0.02
    return quantize(w, GRID, reduced)


@pytest.mark.parametrize("name", SHAPES)
def test_every_code_comes_back_and_every_bit(name: str) -> None:
    """If it fails, a released checkpoint is converted to another model than the one that was trained."""
    shape, reduced = SHAPES[name]
    q = released(shape, reduced)
    w = q.dequantize().astype(jnp.bfloat16)
    found = recover(w, GRID, reduced)
    np.testing.assert_array_equal(found.quantized.codes, q.codes)
    assert found.quantized.scale.shape == q.scale.shape == found.fitting.shape
    assert bool(jnp.all(found.fitting > 0)) and bool(jnp.all(returned(w, found.quantized)))
    # Where one scale fits it is the one; where several do, the true one is among as many neighbours.
    ulps = np.abs(_steps(found.quantized.scale) - _steps(q.scale))
    assert np.all(ulps[np.asarray(found.fitting) == 1] == 0)
    assert np.all(ulps <= np.asarray(found.fitting) // 2)


def _steps(scale: jax.Array) -> np.ndarray:
    return np.asarray(scale).view(np.uint16).astype(np.int32)


def test_rounding_anew_loses_what_recovery_keeps() -> None:
    """The published figure is 49 % of tiles for rounding to nearest; random weights give about that."""
    q = released((2048, 64), (0,))
    w = q.dequantize().astype(jnp.bfloat16)
    naive = quantize(w, GRID, (0,))
    np.testing.assert_array_equal(naive.codes, q.codes)
    assert 0.4 < float(jnp.mean(returned(w, naive))) < 0.6
    closer = np.mean(np.abs(np.asarray(recover(w, GRID, (0,)).quantized.dequantize() - q.dequantize())))  # fmt: skip
    assert closer < 0.6 * np.mean(np.abs(np.asarray(naive.dequantize() - q.dequantize())))


def test_learned_scales_have_their_extremum_at_other_levels() -> None:
    """The first level alone does not find them; with the others every bit comes back."""
    start = released((256, 64), (0,))
    factor = jax.random.uniform(jax.random.key(5), start.scale.shape, minval=1.1, maxval=1.3)
    w = jax.random.normal(jax.random.key(2), (256, 64)) * 0.02
    q = quantize(w, GRID, (0,), start.scale.astype(jnp.float32) * factor)
    rounded = q.dequantize().astype(jnp.bfloat16)
    assert not bool(jnp.all(recover(rounded, GRID, (0,)).fitting > 0))
    found = recover(rounded, GRID, (0,), LEVELS)
    assert bool(jnp.all(returned(rounded, found.quantized))) and bool(jnp.all(found.fitting > 0))


def test_zeros_and_tiles_on_no_lattice() -> None:
    """A tile of zeros has the scale 0 and fits; one of arbitrary numbers is said not to, with the nearest codes."""
    q = released((64, 2), (0,))
    w = q.dequantize().at[:32, 0].set(0.0).at[32:, 1].set(jnp.linspace(-1.0, 1.03, 32))
    found = recover(w.astype(jnp.bfloat16), GRID, (0,), LEVELS)
    np.testing.assert_array_equal(np.asarray(found.fitting) > 0, [[True, True], [True, False]])
    assert float(found.quantized.scale[0, 0]) == 0 and np.all(np.asarray(found.quantized.codes)[:32, 0] == 8)  # fmt: skip
    nearest = quantize(w.astype(jnp.bfloat16), GRID, (0,))
    np.testing.assert_array_equal(found.quantized.codes[32:, 1], nearest.codes[32:, 1])
    np.testing.assert_array_equal(found.quantized.scale[1, 1], nearest.scale[1, 1])
