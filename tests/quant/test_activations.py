"""Rounding of activations: values and gradients by hand. If these fail, what is trained is not what is deployed."""

from __future__ import annotations

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_qat.numerics import Grid
from gemma_qat.quant import Activation, Plan
from gemma_qat.quant.activations import round_again, round_dynamic, round_static, round_tiles

X = np.asarray([[0.0, 0.049, 0.05, 0.15, -0.25], [12.7, 12.8, 13.1, -12.8, -13.1]], np.float32)


def test_static_codes_by_hand() -> None:
    """Ties go to the even code, 127 and -128 are the ends, and the value is code * scale."""
    scale = jnp.asarray([0.125], jnp.float32)
    x = jnp.asarray([[0.0625, 0.1875, 15.9, 16.5, -16.0, -17.0, 0.05]], jnp.float32)
    expected = [[0.0, 0.25, 127 * 0.125, 127 * 0.125, -16.0, -16.0, 0.0]]
    np.testing.assert_array_equal(round_static(x, scale, 127), expected)
    np.testing.assert_array_equal(
        round_static(jnp.asarray([[1.3, -9.0]]), scale, 7), [[0.875, -1.0]]
    )


def test_a_scale_of_zero_is_identity_in_value_and_gradient() -> None:
    """If it fails, an imported site without a scale is rounded to nothing."""
    x, zero = jnp.asarray(X), jnp.zeros(1)
    np.testing.assert_array_equal(round_static(x, zero, 127), X)
    dx, ds = jax.grad(lambda x, s: jnp.sum(3.0 * round_static(x, s, 127)), (0, 1))(x, zero)
    np.testing.assert_array_equal(dx, np.full_like(X, 3.0))
    np.testing.assert_array_equal(ds, [0.0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_static_gradients(dtype: str) -> None:
    """Straight through inside, nothing where it saturates; the scale's by its formula, in float64 here."""
    scale = jnp.asarray([0.1], jnp.float32)
    x = jnp.asarray(X, dtype)
    g = jnp.asarray(np.arange(1.0, 11.0).reshape(2, 5), dtype)
    out, back = jax.vjp(lambda x, s: round_static(x, s, 127), x, scale)
    dx, ds = back(g)
    assert (out.dtype, dx.dtype, ds.dtype) == (x.dtype, x.dtype, np.float32)
    wide, s = np.asarray(x, np.float64), float(scale[0])
    codes = np.round(wide / s)
    inside = (codes >= -128) & (codes <= 127)
    assert inside.sum() in (7, 8)  # 12.8 is one step too far above, on the grid below
    np.testing.assert_array_equal(dx, np.where(inside, np.asarray(g), 0))
    slope = np.where(inside, codes - wide / s, np.clip(codes, -128, 127))
    by_hand = np.sum(np.asarray(g, np.float64) * slope) / np.sqrt(5 * 127)  # rows of 5 features
    np.testing.assert_allclose(ds, [by_hand], rtol=1e-5)  # ten float32 products


@pytest.mark.parametrize("highest", [7, 127])
def test_dynamic_scales_span_the_axes_given(highest: int) -> None:
    """If it fails, a token is rounded with another token's scale."""
    rng = np.random.default_rng(5)
    x = rng.standard_normal((2, 3, 5, 7)).astype(np.float32)
    value, codes, scale = jax.jit(round_dynamic, static_argnums=(1, 2))(x, (2, 3), highest)
    extremum = np.abs(x).max(axis=(2, 3), keepdims=True)
    assert scale.shape == (2, 3, 1, 1)
    np.testing.assert_allclose(scale, extremum / highest, rtol=2e-7)  # one rounding
    assert np.abs(codes).max(axis=(2, 3)).tolist() == np.full((2, 3), highest).tolist()
    assert np.abs(value - x).max() <= float(scale.max()) * 0.5000001
    np.testing.assert_array_equal(value, np.asarray(codes, np.float32) * np.asarray(scale))


def test_dynamic_rounding_of_zeros_and_its_gradient() -> None:
    x = jnp.asarray([[0.0, 0.0], [1.0, -2.0]])
    value, codes, scale = round_dynamic(x, (1,), 127)
    np.testing.assert_array_equal(value[0], [0, 0])
    np.testing.assert_array_equal(scale[0], [1.0])
    np.testing.assert_array_equal(codes[1], [64, -127])  # 63.5 is a tie, to the even code
    grad = jax.grad(
        lambda x: jnp.sum(jnp.asarray([[1.0, 2.0], [3.0, 4.0]]) * round_dynamic(x, (1,), 127)[0])
    )(x)
    np.testing.assert_array_equal(grad, [[1, 2], [3, 4]])


def test_what_an_activation_plan_may_say() -> None:
    with pytest.raises(ValueError, match="activations of 5 bits given, 4 or 8 expected"):
        Activation(bits=5)
    with pytest.raises(ValueError, match="only static scales"):
        Activation(per="token", learned=True)
    assert [Activation(bits=b).highest for b in (4, 8)] == [7, 127]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scale", [0.0, 0.1])
def test_rounding_again_gives_the_same_bits(dtype: str, scale: float) -> None:
    """If it fails, the gradient of a weight is taken with another input than it was multiplied with."""
    x, s = jnp.asarray(X, dtype), jnp.asarray([scale], jnp.float32)
    for highest in (7, 127):
        np.testing.assert_array_equal(round_again(x, s, highest), round_static(x, s, highest))


def test_tiles_are_ggmls_q8_0() -> None:
    """gguf-py's own quantizer of rows: if it fails, training rounds activations otherwise than llama.cpp does."""
    rng = np.random.default_rng(7)
    x = (rng.standard_normal((3, 5, 2, 32)) * 10.0 ** rng.integers(-3, 3, (3, 5, 2, 1))).astype(
        "f4"
    )
    x[0, 0, 0] = 0.0
    kind = gguf.GGMLQuantizationType.Q8_0
    expected = gguf.dequantize(gguf.quantize(x.reshape(15, 64), kind), kind).reshape(x.shape)
    rounded = jax.jit(round_tiles, static_argnums=1)
    np.testing.assert_array_equal(rounded(x, (2, 3)), expected)
    half = jnp.asarray(x, jnp.bfloat16)
    assert rounded(half, (2, 3)).dtype == jnp.bfloat16
    dx = jax.grad(lambda x: jnp.sum(3.0 * round_tiles(x, (2, 3))))(jnp.asarray(x))
    np.testing.assert_array_equal(dx, np.full_like(x, 3.0))
    with pytest.raises(ValueError, match="activations: tile 32 does not divide"):
        round_tiles(jnp.ones((2, 40)), (1,))


def test_tiles_have_eight_bits_and_no_integer_dots() -> None:
    """If it fails, a plan promises a rounding that nothing does."""
    assert str(Activation(per="tile")) == "q8_0 tiles"
    with pytest.raises(ValueError, match="4 bits in tiles"):
        Activation(per="tile", bits=4)
    with pytest.raises(ValueError, match="scale per token; given q8_0 tiles"):
        Plan(weight=Grid(format="int8"), input=Activation(per="tile"), arithmetic="integer")
