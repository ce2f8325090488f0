"""q4_0, as jitted, is ggml's: if these fail, an exported file is not the model that was trained."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from gemma_qat.numerics import Grid, PackedArray, pack, quantize

GRID = Grid(format="q4_0")


@jax.jit
def packed(w: jax.Array) -> PackedArray:
    return pack(quantize(w, GRID, (1,)))


def _ties(rng: np.random.Generator, scale: float, sign: float) -> np.ndarray:
    """Multiples of half a step, so that every other one is an exact tie."""
    w = rng.integers(-16, 17, (500, 320)) * 0.5
    w[:, ::32] = 8 * sign
    return w * scale


WEIGHTS: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "normal": lambda rng: rng.standard_normal((2000, 320)),
    "bfloat16": lambda rng: (0.02 * rng.standard_normal((2000, 320))).astype(ml_dtypes.bfloat16),
    "large": lambda rng: 1e4 * rng.standard_normal((500, 320)),
    "small": lambda rng: 1e-5 * rng.standard_normal((500, 320)),
    "one-sided": lambda rng: np.abs(rng.standard_normal((500, 320))),
    "zeros": lambda rng: rng.standard_normal((500, 320)) * (np.arange(320) >= 64),
    "repeated extremum": lambda rng: rng.integers(-7, 8, (500, 320)),
    **{
        f"ties {scale} {sign}": (lambda rng, s=scale, g=sign: _ties(rng, s, g))
        for scale in (1.0, 0.1, 0.037, 3e-3)
        for sign in (1.0, -1.0)
    },
    "bfloat16 ties": lambda rng: _ties(rng, 0.037, -1.0).astype(ml_dtypes.bfloat16),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_equals_ggufs_quantizer_bit_for_bit(name: str) -> None:
    w = WEIGHTS[name](np.random.default_rng(7)).astype(np.float32)
    blocks = quants.quantize(w, GGMLQuantizationType.Q4_0)
    ours = packed(jnp.asarray(w))
    theirs = blocks.reshape(len(w), -1, 18)
    np.testing.assert_array_equal(np.asarray(ours.words).reshape(len(w), -1, 16), theirs[..., 2:])
    scale = np.ascontiguousarray(theirs[..., :2]).view(np.uint16)[..., 0]
    np.testing.assert_array_equal(np.asarray(ours.scale).view(np.uint16), scale)
    values = quants.dequantize(blocks, GGMLQuantizationType.Q4_0)
    np.testing.assert_array_equal(np.asarray(jax.jit(PackedArray.dequantize)(ours)), values)


def test_jitted_equals_eager() -> None:
    w = jnp.asarray(np.random.default_rng(3).standard_normal((64, 320)), jnp.float32)
    eager = pack(quantize(w, GRID, (1,)))
    np.testing.assert_array_equal(packed(w).words, eager.words)


def test_a_scale_beyond_float16_is_refused() -> None:
    w = jnp.full((1, 32), 1e9, jnp.float32)
    with pytest.raises(ValueError, match="layers/3/attn/q/kernel: scales as float16"):
        quantize(w, GRID, (1,), where="layers/3/attn/q/kernel")
