"""q8_0, as jitted, is ggml's: if these fail, an exported file is not the model that was trained."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from gemma_qat.numerics import Grid, QArray, quantize
from gemma_qat.numerics.scales import from_weights

GRID = Grid(format="q8_0")
Q8_0 = GGMLQuantizationType.Q8_0


def _quantize(w: jax.Array) -> QArray:
    return quantize(w, GRID, (1,))


JITTED, DECODED = jax.jit(_quantize), jax.jit(QArray.dequantize)


def _blocks(q: QArray) -> np.ndarray:
    """Our codes and scales as ggml's 34-byte blocks."""
    rows = q.shape[0]
    scale = np.asarray(q.scale)[..., None].view(np.uint8)
    codes = np.asarray(q.codes).reshape(rows, -1, 32).view(np.uint8)
    return np.concatenate([scale, codes], axis=-1).reshape(rows, -1)


def _ties(rng: np.random.Generator) -> np.ndarray:
    """Every half step of the grid: with 127 as the extremum d is exactly 1."""
    w = 0.5 * rng.integers(-254, 255, (256, 512))
    w[:, ::32] = rng.choice([-127.0, 127.0], (256, 16))
    return w


KINDS = ["normal", "large", "small", "zeros", "ties", "power of two ties", "scaled ties"]


def _weights(kind: str) -> np.ndarray:
    rng = np.random.default_rng(61)
    # One shape for all kinds, so that it compiles once.
    normal = rng.standard_normal((256, 512))
    return {
        "normal": normal,
        "large": 1e5 * normal,
        "small": 1e-4 * normal,
        "zeros": normal * (np.arange(512) >= 64),
        "ties": _ties(rng),
        "power of two ties": _ties(rng) * np.exp2(rng.integers(-12, 8, (256, 1))),
        "scaled ties": _ties(rng) * rng.uniform(1e-3, 1.0, (256, 1)),
    }[kind].astype(np.float32)


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_ggufs_quantizer_bit_for_bit(kind: str, bfloat16: bool) -> None:
    """If it fails, some code or scale in an exported file is not ggml's."""
    w = _weights(kind)
    if bfloat16:
        w = w.astype(ml_dtypes.bfloat16).astype(np.float32)
    expected = quants.quantize(w, Q8_0)
    q = JITTED(jnp.asarray(w))
    np.testing.assert_array_equal(_blocks(q), expected)
    np.testing.assert_array_equal(DECODED(q), quants.dequantize(expected, Q8_0))


def test_eager_equals_jitted() -> None:
    """If it fails, codes depend on how much is compiled at once."""
    w = jnp.asarray(np.concatenate([_weights("scaled ties"), _weights("normal")])[::8])
    np.testing.assert_array_equal(_blocks(_quantize(w)), _blocks(JITTED(w)))


def test_the_scale_is_the_quotient_and_not_a_product() -> None:
    """If it fails, d is 1 / 127 rounded and then multiplied, which is another float32 in one of twenty tiles."""
    w = np.random.default_rng(67).uniform(1e-6, 1e6, (1 << 16, 1)).astype(np.float32)
    found = jax.jit(lambda x: from_weights(x[:, None], 2, GRID))(jnp.asarray(w))[:, 0]
    np.testing.assert_array_equal(found, (w / np.float32(127))[:, 0])
    assert (np.asarray(found) != (w * (1 / np.float32(127)))[:, 0]).mean() > 0.01
