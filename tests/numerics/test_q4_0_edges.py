"""q4_0 against ggml's reference at its edges: eager and jitted, at the ends of float16, over a million weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from gemma_qat.numerics import Grid, PackedArray, pack, quantize

GRID = Grid(format="q4_0")
Q4_0 = GGMLQuantizationType.Q4_0


def _pack(w: jax.Array) -> PackedArray:
    return pack(quantize(w, GRID, (1,)))


JITTED, DECODED = jax.jit(_pack), jax.jit(PackedArray.dequantize)


def _blocks(packed: PackedArray) -> np.ndarray:
    """Our words and scales as ggml's 18-byte blocks."""
    rows = packed.scale.shape[0]
    scale = np.asarray(packed.scale)[..., None].view(np.uint8)
    words = np.asarray(packed.words).reshape(rows, -1, 16)
    return np.concatenate([scale, words], axis=-1).reshape(rows, -1)


def _bfloat16(w: np.ndarray) -> np.ndarray:
    return w.astype(ml_dtypes.bfloat16).astype(np.float32)


def _ties(rng: np.random.Generator) -> np.ndarray:
    """Every half step of the grid around every extremum, times scales that are no power of two."""
    w = 0.5 * rng.integers(-16, 17, (512, 1024))
    w[:, ::32] = rng.choice([-8.0, 8.0], (512, 32))
    return (w * rng.uniform(1e-3, 1.0, (512, 1))).astype(np.float32)


@pytest.mark.parametrize("kind", ["normal", "bfloat16", "ties", "bfloat16 ties"])
def test_a_million_weights(kind: str) -> None:
    """If it fails, some code in an exported file is not ggml's."""
    rng = np.random.default_rng(43)
    # One shape for all kinds, so that it compiles once; two million weights in all.
    w = _ties(rng) if "ties" in kind else 0.02 * rng.standard_normal((512, 1024))
    w = np.asarray(w, np.float32)
    if "bfloat16" in kind:
        w = _bfloat16(w)
    expected = quants.quantize(w, Q4_0)
    packed = JITTED(jnp.asarray(w))
    np.testing.assert_array_equal(_blocks(packed), expected)
    np.testing.assert_array_equal(DECODED(packed), quants.dequantize(expected, Q4_0))


@pytest.mark.parametrize("magnitude", [1e-6, 1e-4, 1.0, 1e4, 1.7e5])
def test_from_the_smallest_float16_to_the_largest(magnitude: float) -> None:
    """d runs from float16's subnormals (below 6.1e-5) to its end (65504), and eager equals jitted."""
    rng = np.random.default_rng(47)
    w = (magnitude * np.clip(rng.standard_normal((64, 96)), -3, 3)).astype(np.float32)
    w = np.concatenate([w, _bfloat16(w)])
    packed = JITTED(jnp.asarray(w))
    assert bool(jnp.isfinite(packed.scale).all()) and bool((packed.scale != 0).all())
    np.testing.assert_array_equal(_blocks(packed), quants.quantize(w, Q4_0))
    np.testing.assert_array_equal(_blocks(_pack(jnp.asarray(w))), _blocks(packed))


def test_eager_equals_jitted_on_ties() -> None:
    w = jnp.asarray(_ties(np.random.default_rng(53))[:64, :96])
    np.testing.assert_array_equal(_blocks(_pack(w)), _blocks(JITTED(w)))


def test_zero_blocks_are_ggmls_sign_included() -> None:
    """ggml divides 0 by -8: d is minus zero, and every code is 8."""
    w = np.zeros((2, 64), np.float32)
    w[0, 32:] = 1.0
    blocks = _blocks(JITTED(jnp.asarray(w)))
    np.testing.assert_array_equal(blocks, quants.quantize(w, Q4_0))
    assert blocks[1, :18].tolist() == [0x00, 0x80] + [0x88] * 16


def test_where_float16_gives_up() -> None:
    """Below half its smallest number d is 0 for ggml too; we write zero codes, ggml those of its float d."""
    w = np.full((1, 32), 1e-8, np.float32)
    ours, theirs = _blocks(JITTED(jnp.asarray(w))), quants.quantize(w, Q4_0)
    np.testing.assert_array_equal(ours[:, :2], theirs[:, :2])
    assert ours[0, 2:].tolist() == [0x88] * 16
    for blocks in (ours, theirs):
        np.testing.assert_array_equal(quants.dequantize(blocks, Q4_0), np.zeros((1, 32)))
