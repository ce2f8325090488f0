"""Gradients of fake quantization: by value, against finite differences of a smooth stand-in, under every transform."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_qat.numerics import FORMATS, Grid, mse_search, quantize
from gemma_qat.quant import fake_quantize, fake_quantize_learned

NAMES = tuple(FORMATS)
RNG = np.random.default_rng(59)
W = jnp.asarray(RNG.standard_normal((64, 6)), jnp.float32)
G = jnp.asarray(RNG.standard_normal((64, 6)), jnp.float32)
LARGEST = {"int2": 2, "int2_no_zero": 1.5, "int4": 8, "int8": 128, "q4_0": 8}


def _grid(name: str) -> Grid:
    return Grid(format=name, tile=32)


def _learned_loss(grid: Grid) -> Callable[..., jax.Array]:
    return lambda w, s: jnp.sum(G * fake_quantize_learned(w, s, grid, (0,))[0])


@pytest.mark.parametrize("name", NAMES)
def test_learned_gradients_are_those_of_a_smooth_stand_in(name: str) -> None:
    """Freeze each rounding residual r = round(w / s) - w / s: s * clip(w / s + r) is smooth, and has our gradient.

    Central differences in float64 of a function that is linear in w and in s: exact up to rounding.
    """
    fmt, grid = FORMATS[name], _grid(name)
    scale = (0.6 * mse_search(W, grid, (0,))).astype(grid.scale_dtype).astype(jnp.float32)
    dw, ds = jax.jit(jax.grad(_learned_loss(grid), (0, 1)))(W, scale)
    w, s = np.asarray(W, np.float64), np.asarray(scale, np.float64)
    spread = np.repeat(s, 32, axis=0)
    # Against the levels of the grid: half-integer ones for the grid without zero.
    offset = fmt.zero % 1
    nearest = np.round(w / spread + offset) - offset
    residual = nearest - w / spread
    low, high = fmt.lowest, fmt.highest
    clipped = (nearest < low) | (nearest > high)
    assert 0 < clipped.mean() < 1

    def smooth(w: np.ndarray, spread: np.ndarray) -> np.ndarray:
        inside = spread * (w / spread + residual)
        edge = spread * np.clip(nearest, low, high)
        return np.asarray(G, np.float64) * np.where(clipped, edge, inside)

    h = 1e-4
    by_w = (smooth(w + h, spread) - smooth(w - h, spread)) / (2 * h)
    by_s = (smooth(w, spread + h * spread) - smooth(w, spread - h * spread)) / (2 * h * spread)
    np.testing.assert_allclose(dw, by_w, rtol=1e-6, atol=1e-9)
    expected = by_s.reshape(2, 32, 6).sum(axis=1) / np.sqrt(32 * LARGEST[name])
    # w / s in float32 is right to 1e-7 of at most 128 levels, 32 of them summed.
    np.testing.assert_allclose(ds, expected, rtol=1e-4, atol=1e-5)


def test_a_tile_worked_out_by_hand() -> None:
    """int4, s = 2: w = 3 -> 1.5 -> code 2, inside; w = 20 -> clipped to 7; w = -17 -> -8.5 -> -8, inside; w = -30 -> -8."""
    w = jnp.asarray([[3.0], [20.0], [-17.0], [-30.0]])
    g = jnp.asarray([[1.0], [10.0], [100.0], [1000.0]])
    grid = Grid(format="int4", tile=4)
    value, pull = jax.vjp(
        lambda w, s: fake_quantize_learned(w, s, grid, (0,))[0], w, jnp.full((1, 1), 2.0)
    )
    assert value[:, 0].tolist() == [4.0, 14.0, -16.0, -16.0]
    dw, ds = pull(g)
    assert dw[:, 0].tolist() == [1.0, 0.0, 100.0, 0.0]
    slope = 1 * (2 - 1.5) + 10 * 7 + 100 * (-8 + 8.5) + 1000 * -8
    np.testing.assert_allclose(ds, [[slope / np.sqrt(4 * 8)]], rtol=1e-6)


def test_recomputed_scales_pass_through_where_the_far_end_saturates() -> None:
    w = jnp.asarray(np.linspace(-1, 1, 32)[:, None], jnp.float32)
    for name in NAMES:
        value, pull = jax.vjp(lambda x: fake_quantize(x, _grid(name), (0,))[0], w)
        assert float(jnp.abs(value - w).max()) > 0
        np.testing.assert_array_equal(pull(G[:32, :1])[0], G[:32, :1])


@pytest.mark.parametrize("name", NAMES)
def test_a_scale_of_zero_gives_zeros_and_no_scale_gradient(name: str) -> None:
    """If it fails, one empty tile makes the whole step nan."""
    grid = _grid(name)
    scale = mse_search(W, grid, (0,)).at[1, 2].set(0.0)
    value, _ = fake_quantize_learned(W, scale, grid, (0,))
    assert not np.asarray(value)[32:, 2].any()
    dw, ds = jax.grad(_learned_loss(grid), (0, 1))(W, scale)
    assert bool(jnp.isfinite(dw).all()) and bool(jnp.isfinite(ds).all())
    assert float(ds[1, 2]) == 0 and float(ds[0, 2]) != 0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_learned_scales_are_used_as_they_are_stored(dtype: str) -> None:
    """If it fails, jitted training runs on float32 scales that no file holds. The gradient is that of the stored ones."""
    grid = Grid(format="int4", tile=32, scale_dtype=dtype)
    off = 0.8 * mse_search(W, grid, (0,)) * 1.0003
    rounded = off.astype(dtype).astype(jnp.float32)
    assert bool((off != rounded).all())
    both = jax.jit(lambda w, s: fake_quantize_learned(w, s, grid, (0,)))
    np.testing.assert_array_equal(both(W, off)[0], both(W, rounded)[0])
    levels = both(W, off)[1].codes.astype(jnp.float32)
    np.testing.assert_array_equal(both(W, off)[0], levels * jnp.repeat(rounded, 32, axis=0))
    gradient = jax.jit(jax.grad(_learned_loss(grid), (0, 1)))
    for a, b in zip(gradient(W, off), gradient(W, rounded), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients_have_the_dtype_of_what_they_belong_to(dtype: jnp.dtype) -> None:
    w, scale = W.astype(dtype), jnp.ones((2, 6), jnp.float32)
    dw, ds = jax.grad(_learned_loss(_grid("int4")), (0, 1))(w, scale)
    assert (dw.dtype, ds.dtype) == (dtype, jnp.float32)
    plain = jax.grad(lambda x: jnp.sum(G * fake_quantize(x, _grid("int4"), (0,))[0]))(w)
    assert plain.dtype == dtype
    np.testing.assert_array_equal(plain, G.astype(dtype))


STACK = jnp.stack([W, 2 * W, W - 0.3])


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("name", ["q4_0", "int2_no_zero"])
def test_codes_ride_along_under_every_transform(name: str, learned: bool) -> None:
    """Codes are int8 and have float0 cotangents; as an output of scan, vmap and remat they must not stop a gradient."""
    grid = _grid(name)
    scales = jnp.stack([0.8 * mse_search(w, grid, (0,)) for w in STACK])

    def loss(w: jax.Array, s: jax.Array):
        if learned:
            value, q = fake_quantize_learned(w, s, grid, (0,))
        else:
            value, q = fake_quantize(w, grid, (0,))
        return jnp.sum(jnp.sin(value)), (value, q)

    def scanned(ws: jax.Array, ss: jax.Array):
        def layer(total: jax.Array, leaves: tuple[jax.Array, jax.Array]):
            part, out = jax.checkpoint(loss)(*leaves)
            return total + part, out

        return jax.lax.scan(layer, jnp.zeros(()), (ws, ss))

    one = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
    expected = [one(w, s) for w, s in zip(STACK, scales, strict=True)]
    over_scan = jax.jit(jax.grad(scanned, (0, 1), has_aux=True))(STACK, scales)
    over_vmap = jax.jit(jax.vmap(jax.grad(loss, (0, 1), has_aux=True)))(STACK, scales)
    for gradients, (value, q) in (over_scan, over_vmap):
        for i, ((dw, ds), (one_value, one_q)) in enumerate(expected):
            np.testing.assert_array_equal(q.codes[i], one_q.codes)
            np.testing.assert_array_equal(q.scale[i], one_q.scale)
            np.testing.assert_array_equal(value[i], one_value)
            # cos and the sum over a tile may be compiled in another order.
            np.testing.assert_allclose(gradients[0][i], dw, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(gradients[1][i], ds, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_codes_in_a_train_step_are_the_quantizers(name: str) -> None:
    """Compiled into a step, beside a matmul, an update and a gradient, the codes stay those of the quantizer alone."""
    grid, x = _grid(name), jnp.asarray(RNG.standard_normal((5, 64)), jnp.float32)

    @jax.jit
    def step(w: jax.Array):
        def loss(w: jax.Array):
            value, q = fake_quantize(w, grid, (0,))
            return jnp.sum(jnp.square(x @ value)), (value, q)

        gradient, (value, q) = jax.grad(loss, has_aux=True)(w)
        return w - 1e-3 * gradient, value, q

    w = 0.5 * jnp.round(W * 8) * 0.037  # many exact ties
    _, value, q = step(w)
    alone = jax.jit(lambda w: quantize(w, grid, (0,)))(w)
    np.testing.assert_array_equal(q.codes, alone.codes)
    np.testing.assert_array_equal(q.scale, alone.scale)
    np.testing.assert_array_equal(value, alone.dequantize())
