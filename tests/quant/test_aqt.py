"""The int4 tile against AQT, an implementation we did not write.

AQT's symmetric 4-bit quantizer (`quantizer_make(4)`) divides by absmax / 7.5, keeps to -7 .. 7 and multiplies by the
reciprocal of the scale. Our `int4` with tile 32 and divisor 7.5 has the same scales; its one more code, -8, is reached
only by an extremum that is negative, where its -7.5 is a tie after rounding and goes to the even -8. Scales, all other
codes, and the values once -8 is held to -7, are equal bit for bit: difference 0.0.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from aqt.jax.v2 import aqt_quantizer

from gemma_qat.numerics import Grid, quantize

GRID = Grid(format="int4", tile=32, divisor=7.5)


@pytest.mark.parametrize("positive_extrema", [False, True])
def test_equals_aqts_int4_tiles(positive_extrema: bool) -> None:
    """If it fails, our int4 is not the grid that AQT, Qwix and their users train on."""
    rng = np.random.default_rng(61)
    tiles = 0.02 * rng.standard_normal((8, 32, 40)).astype(np.float32)
    if positive_extrema:
        tiles[:, 5] = 1.01 * np.abs(tiles).max(axis=1)
    theirs, _ = aqt_quantizer.quantizer_make(4).quant(jnp.asarray(tiles), calibration_axes=[1])
    ours = quantize(jnp.asarray(tiles).reshape(256, 40), GRID, (0,))
    assert theirs.scale is not None and theirs.qvalue is not None
    codes = np.asarray(ours.codes).reshape(8, 32, 40)
    np.testing.assert_array_equal(ours.scale, np.asarray(theirs.scale[0])[:, 0])
    np.testing.assert_array_equal(np.maximum(codes, -7), np.asarray(theirs.qvalue, np.int8))
    is_extremum = tiles == -np.abs(tiles).max(axis=1, keepdims=True)
    assert not ((codes == -8) & ~is_extremum).any()
    assert (codes == -8).any() != positive_extrema
    within = dataclasses.replace(ours, codes=jnp.maximum(ours.codes, -7))
    difference = np.asarray(within.dequantize()) - np.asarray(theirs.dequant()).reshape(256, 40)
    assert np.abs(difference).max() == 0.0
