"""q6_k: ggml's super-blocks, their two levels of rounding, and ggml's own reader of our bytes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from gemma_qat.errors import InputError
from gemma_qat.numerics import Grid, QArray, mse_search, pack, quantize
from gemma_qat.numerics.scales import stored
from gemma_qat.quant import fake_quantize_learned

GRID = Grid(format="q6_k")
ROUNDED = jax.jit(lambda scale: stored(scale, GRID, 1))
LENGTH = 32
"""Two super-blocks of scales."""


def _bits(x: jax.Array | np.ndarray) -> np.ndarray:
    return np.asarray(x, np.float32).view(np.uint32)


def _reference(scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """d and sc of each super-block, as `quantize_row_q6_K_ref` writes them."""
    blocks = scale.reshape(-1, 16)
    top = np.take_along_axis(blocks, np.abs(blocks).argmax(1)[:, None], axis=1)
    inverse = np.float32(-128) * (np.float32(1) / np.where(top == 0, np.float32(1), top))
    d = np.where(top == 0, np.float16(0), (np.float32(1) / inverse).astype(np.float16))
    return d, np.clip(np.rint(inverse * blocks), -128, 127)


def _scales(kind: str, magnitude: float) -> np.ndarray:
    rng = np.random.default_rng(71)
    scale = (magnitude * rng.standard_normal((500, LENGTH))).astype(np.float32)
    if kind == "bfloat16":
        return scale.astype(ml_dtypes.bfloat16).astype(np.float32)
    if kind == "half steps of float16":  # m / -128 lies in the middle between two float16
        middle = scale[:, ::16].astype(np.float16).astype(np.float32)
        beyond = np.nextafter(middle.astype(np.float16), np.float16(np.inf)).astype(np.float32)
        scale[:, ::16] = 64 * (middle + beyond)
    return scale


@pytest.mark.parametrize("magnitude", [1e-5, 3e-4, 1e-2, 10.0, 1e4])
@pytest.mark.parametrize("kind", ["normal", "bfloat16", "half steps of float16"])
def test_two_levels_are_ggmls_and_rounding_again_changes_no_bit(
    kind: str, magnitude: float
) -> None:
    """If it fails, learned scales drift at every step, or the file holds others. 1e-5, 3e-4: d is subnormal."""
    scale = _scales(kind, magnitude)
    found = ROUNDED(jnp.asarray(scale))
    d, small = _reference(scale)
    assert (d != 0).all() and np.isfinite(d).all()
    np.testing.assert_array_equal(found, (np.float32(d) * small).reshape(scale.shape))
    np.testing.assert_array_equal(_bits(stored(jnp.asarray(scale), GRID, 1)), _bits(found))
    np.testing.assert_array_equal(_bits(ROUNDED(found)), _bits(found))
    assert not np.signbit(np.asarray(found)[np.asarray(found) == 0]).any()


def test_every_float16_comes_back() -> None:
    """If it fails, some d moves when scales that are on the grid are rounded. All 65504 finite ones, both signs."""
    d = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    d = d[np.isfinite(d)].astype(np.float32)
    small = np.random.default_rng(73).integers(-128, 128, (len(d), 16)).astype(np.float32)
    small[:, 5] = -128
    scale = d[:, None] * small
    np.testing.assert_array_equal(ROUNDED(jnp.asarray(scale)), scale)


def test_super_blocks_without_a_scale() -> None:
    """If it fails, zeros or tiny super-blocks become NaN, or infect their neighbours."""
    scale = np.zeros((4, LENGTH), np.float32)
    scale[:, 16:] = 1.0
    scale[1, :16], scale[2, :16], scale[3, 3] = -0.0, 1e-7, 1e-42
    for run in (ROUNDED, lambda s: stored(s, GRID, 1)):
        found = np.asarray(run(jnp.asarray(scale)))
        assert _bits(found[:, :16]).max() == 0
        np.testing.assert_array_equal(found[:, 16:], np.ones((4, 16)))


def test_a_small_tile_beside_a_large_one_becomes_zero() -> None:
    w = np.full((1, 256), 1.0, np.float32)
    w[0, :16], w[0, 16:32] = 3e-3, 5e-3
    q = quantize(jnp.asarray(w), GRID, (1,))
    assert np.asarray(q.scale)[0, :3].tolist() == [0.0, float(q.scale[0, 2]) / 128, -1 / 32]
    assert set(np.asarray(q.codes)[0, :16].tolist()) == {0}


@pytest.mark.parametrize(
    ("shape", "reduced"), [((3, 512), (1,)), ((256, 3), (0,)), ((5, 2, 256), (2,))]
)
def test_ggmls_reader_gives_our_values(shape: tuple[int, ...], reduced: tuple[int, ...]) -> None:
    """If it fails, what llama.cpp multiplies by is not what training did."""
    w = np.random.default_rng(79).standard_normal(shape).astype(np.float32)
    q = jax.jit(lambda x: quantize(x, GRID, reduced))(jnp.asarray(w))
    packed = pack(q)
    scale = np.asarray(packed.scale).reshape(-1, 16)
    d, small = _reference(scale)
    parts = [np.asarray(packed.words).reshape(-1, 192), small.astype(np.int8).view(np.uint8)]
    blocks = np.concatenate([*parts, d.view(np.uint8)], axis=1)
    values = quants.dequantize(blocks, GGMLQuantizationType.Q6_K)
    ours = np.moveaxis(np.asarray(jax.jit(QArray.dequantize)(q)), reduced[0], -1)
    np.testing.assert_array_equal(values.reshape(ours.shape), ours)


def test_eager_equals_jitted() -> None:
    """If it fails, codes depend on how much is compiled at once."""
    w = np.random.default_rng(83).standard_normal((64, 512)).astype(np.float32)
    w[32:] = w[32:].astype(ml_dtypes.bfloat16)
    eager = quantize(jnp.asarray(w), GRID, (1,))
    jitted = jax.jit(lambda x: quantize(x, GRID, (1,)))(jnp.asarray(w))
    np.testing.assert_array_equal(eager.codes, jitted.codes)
    np.testing.assert_array_equal(_bits(eager.scale), _bits(jitted.scale))


def test_a_search_falls_back_by_super_block() -> None:
    """If it fails, rounding the winners together may cost more than searching gained.

    Of 2000 super-blocks with tiles of very different size some are better off with plain scales.
    """
    rng = np.random.default_rng(89)
    spread = np.exp(2 * rng.standard_normal((2000, 16, 1)))
    w = jnp.asarray((spread * rng.standard_normal((2000, 16, 16))).reshape(2000, 256), jnp.float32)

    def error(scale: jax.Array | None) -> np.ndarray:
        values = quantize(w, GRID, (1,), scale).dequantize()
        return np.sum(np.square(np.asarray(values, np.float64) - np.asarray(w)), axis=1)

    searched, plain = error(mse_search(w, GRID, (1,))), error(None)
    # Errors are compared in float32: 256 terms, each right to a few parts in 2^24.
    assert (searched <= plain * (1 + 1e-5)).all()
    assert searched.sum() < 0.95 * plain.sum()


def test_a_learned_step_trains_the_scales_that_are_stored() -> None:
    """If it fails, a step of training sees scales that no file can hold."""
    w = jnp.asarray(np.random.default_rng(97).standard_normal((4, 256)), jnp.float32)
    scale = 1.01 * mse_search(w, GRID, (1,))
    loss = lambda s: jnp.sum(jnp.square(fake_quantize_learned(w, s, GRID, (1,))[0] - w))  # noqa: E731
    before, slope = jax.value_and_grad(loss)(scale)
    assert bool(jnp.isfinite(slope).all())
    assert float(loss(scale - 1e-3 * slope)) < float(before)
    _, q = fake_quantize_learned(w, scale, GRID, (1,))
    np.testing.assert_array_equal(_bits(ROUNDED(q.scale)), _bits(q.scale))


def test_scales_beyond_float16_are_refused() -> None:
    w = jnp.full((1, 256), 65536.0 * 128 * 32, jnp.float32)
    with pytest.raises(ValueError, match="embed/table: scales as float32: 16 of 16"):
        quantize(w, GRID, (1,), where="embed/table")


def test_an_axis_of_half_a_super_block_is_refused() -> None:
    with pytest.raises(ValueError, match="ffn/up: super-block 256 does not divide .* axis of 384"):
        quantize(jnp.ones((384, 2)), GRID, (0,), where="ffn/up")
    with pytest.raises(InputError, match="nearest: q6_k"):
        Grid(format="q6k")
