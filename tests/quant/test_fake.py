"""Fake quantization: forward is what is exported, backward is straight through with LSQ's gradient for scales."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_qat.numerics import FORMATS, Grid, mse_search, quantize
from gemma_qat.numerics.scales import stored
from gemma_qat.quant import fake_quantize, fake_quantize_learned

RNG = np.random.default_rng(0)
W = jnp.asarray(RNG.standard_normal((64, 6)), jnp.float32)
G = jnp.asarray(RNG.standard_normal((64, 6)), jnp.float32)
W2, G2 = (jnp.asarray(RNG.standard_normal((512, 6)), jnp.float32) for _ in range(2))
NAMES = tuple(FORMATS)


def _case(name: str) -> tuple[Grid, jax.Array, jax.Array]:
    """The format in tiles of 32, or in those it demands, with weights and a gradient of two tiles or super-blocks."""
    fmt = FORMATS[name]
    pair = (W2, G2) if fmt.super_tiles > 1 else (W, G)
    return Grid(format=name, tile=fmt.tile or 32), *pair


@pytest.mark.parametrize("name", NAMES)
def test_forward_is_the_quantizer(name: str) -> None:
    grid, weights, _ = _case(name)
    value, q = jax.jit(lambda w: fake_quantize(w, grid, (0,)))(weights)
    np.testing.assert_array_equal(value, quantize(weights, grid, (0,)).dequantize())
    np.testing.assert_array_equal(q.codes, quantize(weights, grid, (0,)).codes)
    scale = mse_search(weights, grid, (0,))
    value, _ = jax.jit(lambda w, s: fake_quantize_learned(w, s, grid, (0,)))(weights, scale)
    np.testing.assert_array_equal(value, quantize(weights, grid, (0,), scale).dequantize())


@pytest.mark.parametrize("name", NAMES)
def test_recomputed_scales_pass_the_gradient_through(name: str) -> None:
    grid, weights, g = _case(name)
    gradient = jax.grad(lambda w: jnp.sum(g * fake_quantize(w, grid, (0,))[0]))(weights)
    np.testing.assert_array_equal(gradient, g)


@pytest.mark.parametrize("name", NAMES)
def test_learned_scales_follow_lsq(name: str) -> None:
    """By hand: dw is g where nothing was clipped; ds adds g * (level - w/s inside, level outside), scaled."""
    grid, weights, g = _case(name)
    fmt, tile = FORMATS[name], grid.tile
    assert tile is not None
    scale = 0.6 * mse_search(weights, grid, (0,))  # small enough to clip
    used = np.asarray(stored(scale, grid, 0).astype(jnp.float32))

    def loss(w: jax.Array, s: jax.Array) -> jax.Array:
        return jnp.sum(g * fake_quantize_learned(w, s, grid, (0,))[0])

    dw, ds = jax.jit(jax.grad(loss, (0, 1)))(weights, scale)
    s = np.repeat(used, tile, axis=0)
    w = np.asarray(weights)
    # No element here is an exact tie, so halves away from zero need no words of their own.
    raw = np.floor(w / s + fmt.zero + 0.5) if fmt.ties == "up" else np.round(w / s + fmt.zero)
    codes = np.clip(raw, fmt.code_min, fmt.code_max)
    inside = raw == codes
    assert 0 < inside.mean() < 1
    np.testing.assert_array_equal(dw, np.where(inside, g, 0))
    slope = (codes - fmt.zero) - np.where(inside, w / s, 0)
    gain = 1 / np.sqrt(tile * max(abs(fmt.lowest), abs(fmt.highest)))
    expected = gain * np.sum(np.asarray(g * slope).reshape(-1, tile, 6), axis=1)
    np.testing.assert_allclose(ds, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["q4_0", "int2"])
def test_scales_of_held_masters_have_the_derivative_at_fixed_codes(name: str) -> None:
    """If it fails, scales alone are trained as if their masters moved along, and make the model worse."""
    grid, weights, g = _case(name)
    fmt, tile = FORMATS[name], grid.tile
    assert tile is not None
    scale = mse_search(weights, grid, (0,))

    def loss(w: jax.Array, s: jax.Array) -> jax.Array:
        return jnp.sum(g * fake_quantize_learned(w, s, grid, (0,), "held")[0])

    dw, ds = jax.grad(loss, (0, 1))(weights, scale)
    codes = np.asarray(quantize(weights, grid, (0,), scale).codes, np.float64) - fmt.zero
    gain = 1 / np.sqrt(tile * max(abs(fmt.lowest), abs(fmt.highest)))
    expected = gain * np.sum((np.asarray(g) * codes).reshape(-1, tile, 6), axis=1)
    np.testing.assert_allclose(ds, expected, rtol=1e-4, atol=1e-5)
    assert not np.any(dw)


def test_a_float16_scale_is_used_as_it_is_stored() -> None:
    """If it fails, the d in the file is not the d that was trained."""
    scale = jnp.full((2, 6), 0.1000123, jnp.float32)
    value, q = fake_quantize_learned(W, scale, Grid(format="q4_0"), (0,))
    assert q.scale.dtype == jnp.float16
    np.testing.assert_array_equal(
        value, (q.codes.astype(jnp.float32) - 8) * jnp.float32(np.float16(0.1000123))
    )


def test_inside_scan_vmap_and_remat() -> None:
    grid = Grid(format="q4_0")
    stack = jnp.stack([W, 2 * W, W - 0.3])

    def loss(w: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(fake_quantize(w, grid, (0,))[0]))

    def scanned(ws: jax.Array) -> jax.Array:
        return jnp.sum(jax.lax.scan(lambda c, w: (c, jax.checkpoint(loss)(w)), 0.0, ws)[1])

    expected = np.stack([jax.grad(loss)(w) for w in stack])
    np.testing.assert_allclose(jax.grad(scanned)(stack), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(jax.grad(loss))(stack), expected, rtol=1e-6)


def test_parity_with_aqt() -> None:
    """An implementation we did not write: AQT's int4 is absmax / 7.5 per tile, on -7 .. 7, ours has -8 too."""
    from aqt.jax.v2 import aqt_quantizer

    theirs, _ = aqt_quantizer.quantizer_make(4).quant(W.reshape(2, 32, 6), calibration_axes=[1])
    ours = quantize(W, Grid(format="int4", tile=32, divisor=7.5), (0,))
    symmetric = dataclasses.replace(ours, codes=jnp.maximum(ours.codes, -7))
    assert (
        0 < int(jnp.sum(ours.codes == -8)) < 12
    )  # only extrema, whose exact ties round to the even code
    np.testing.assert_allclose(symmetric.dequantize(), theirs.dequant().reshape(64, 6), rtol=1e-6)
