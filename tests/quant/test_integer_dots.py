"""Integer dots against AQT doing it all by itself, and the noise of quantized gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from aqt.jax.v2 import aqt_quantizer, config

from gemma_qat.numerics import Grid, QArray, quantize
from gemma_qat.quant import Backward, fake_quantize
from gemma_qat.quant.aqt import integer_dot, integer_grouped_dot

RNG = np.random.default_rng(23)
X = jnp.asarray(RNG.standard_normal((2, 7, 64)), jnp.float32)
W = jnp.asarray(RNG.standard_normal((64, 13)), jnp.float32)
G = jnp.asarray(RNG.standard_normal((2, 7, 13)), jnp.float32)
GRIDS = {8: Grid(format="int8", divisor=127.5), 4: Grid(format="int4", divisor=7.5)}


def _positive(w: jax.Array) -> jax.Array:
    """The same with a positive extremum in every channel: AQT has no code for the tie of a negative one."""
    return w.at[..., 5, :].set(1.01 * jnp.abs(w).max(axis=-2))


def _aqts(x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    q, _ = aqt_quantizer.quantizer_make(8).quant(x, calibration_axes=[axis])
    assert q.qvalue is not None and q.scale is not None
    return q.qvalue.astype(jnp.int8), q.scale[0]


def test_forward_equals_aqts_own() -> None:
    """AQT quantizes both operands and multiplies; we hand it the same codes made here: equal to float rounding."""
    w = _positive(W)
    dot = config.config_v4(fwd_bits=8, dlhs_bits=None, drhs_bits=None)
    theirs = jax.jit(lambda x, w: dot(x, w, (((2,), (0,)), ((), ()))))(X, w)
    codes, scale = _aqts(X, 2)
    q = quantize(w, GRIDS[8], (0,))
    ours = jax.jit(integer_dot)(X, codes, scale, q.dequantize(), q)
    np.testing.assert_allclose(ours, theirs, rtol=5e-7, atol=1e-6)  # two products each


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("experts", [False, True])
def test_fake_quantized_weights_equal_aqts(bits: int, experts: bool) -> None:
    """Forward and gradients of a contraction with a per-channel weight, dense and expert by expert."""
    w = _positive(jnp.stack([W, 2 * W[::-1]]) if experts else W)
    x = jnp.stack([X[0], X[1]]) if experts else X

    def theirs(x: jax.Array, w: jax.Array) -> jax.Array:
        q, _ = aqt_quantizer.quantizer_make(bits).quant(w, calibration_axes=[w.ndim - 2])
        w = w + jax.lax.stop_gradient(q.dequant() - w)
        return jnp.einsum("ETD,EDF->ETF" if experts else "BTD,DF->BTF", x, w)

    def ours(x: jax.Array, w: jax.Array) -> jax.Array:
        w, _ = fake_quantize(w, GRIDS[bits], (w.ndim - 2,))
        return jnp.einsum("ETD,EDF->ETF" if experts else "BTD,DF->BTF", x, w)

    g = G
    (a, back_a), (b, back_b) = jax.vjp(ours, x, w), jax.vjp(theirs, x, w)
    np.testing.assert_allclose(a, b, atol=2e-5)  # 64 products of size 1, each one rounding apart
    for mine, other in zip(back_a(g), back_b(g), strict=True):
        np.testing.assert_allclose(mine, other, atol=2e-5)


def _gradients(
    x: jax.Array, backward: Backward | None, weight: jax.Array = W
) -> tuple[jax.Array, jax.Array]:
    codes, scale = _aqts(x, 2)
    q = quantize(weight, GRIDS[8], (0,))

    def f(x: jax.Array, w: jax.Array) -> jax.Array:
        return integer_dot(x, codes, scale, w, q, backward)

    return jax.vjp(f, x, q.dequantize())[1](G)


def test_gradients_pass_straight_without_a_backward_plan() -> None:
    dx, dw = _gradients(X, None)
    w = quantize(W, GRIDS[8], (0,)).dequantize()
    np.testing.assert_allclose(dx, jnp.einsum("BTF,DF->BTD", G, w), atol=1e-5)
    np.testing.assert_allclose(dw, jnp.einsum("BTD,BTF->DF", X, G), atol=1e-5)


def test_noise_is_the_operands_own_and_unbiased() -> None:
    """The same operand draws the same noise (a resumed run), another draws other noise, and the mean is the gradient."""
    stochastic, nearest = Backward(), Backward(stochastic=False)
    first, again = (jax.jit(lambda x: _gradients(x, stochastic))(X) for _ in range(2))
    np.testing.assert_array_equal(first[0], again[0])
    assert not np.array_equal(first[0], _gradients(X * 1.0000002, stochastic)[0])
    # Sites that share their input (gate and up): this gradient is of input and output alone, so only noise differs.
    assert not np.array_equal(first[1], _gradients(X, stochastic, W[::-1] + 0.1)[1])
    np.testing.assert_allclose(
        _gradients(X, Backward(stochastic=False), W[::-1] + 0.1)[1],
        _gradients(X, Backward(stochastic=False))[1], rtol=1e-6,
    )  # fmt: skip
    exact = _gradients(X, None)
    nudges = jnp.asarray(1 + 1e-6 * np.arange(1, 201), jnp.float32)
    draws = jax.jit(jax.vmap(lambda s: _gradients(X * s, stochastic)))(nudges)
    for draw, true, plain in zip(draws, exact, _gradients(X, nearest), strict=True):
        spread = np.asarray(draw).std(axis=0).mean()
        bias = np.abs(np.asarray(draw).mean(axis=0) - np.asarray(plain))
        # Mean of 200 draws: spread / sqrt(200) each, its mean magnitude 0.8 of that; half a step of nearest beside it.
        assert bias.mean() < 0.8 * spread / np.sqrt(200) + np.abs(plain - true).mean()
        assert spread > 0 and np.abs(plain - true).mean() < 0.02 * np.abs(true).mean()


def test_experts_equal_the_dense_dot_bit_for_bit() -> None:
    """If it fails, an expert's rows are scaled as another's."""
    w = jnp.stack([W, -3 * W, W[::-1]])
    q = quantize(w, GRIDS[4], (1,))
    rows = X.reshape(14, 64)
    codes, scale = _aqts(rows, 1)
    sizes = jnp.asarray([6, 0, 8], jnp.int32)
    got = jax.jit(integer_grouped_dot)(rows, codes, scale, q.dequantize(), q, sizes)
    for part, e in ((slice(0, 6), 0), (slice(6, 14), 2)):
        one = QArray(q.codes[e], q.scale[e], q.grid, (0,))
        alone = integer_dot(rows[part], codes[part], scale[part], one.dequantize(), one)
        np.testing.assert_array_equal(got[part], alone)
