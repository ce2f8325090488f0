"""Scales: what a search may claim, what finer tiles buy, which types hold them, and what is refused."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_qat.numerics import FORMATS, Grid, mse_search, quantize
from gemma_qat.numerics.scales import stored

NAMES = tuple(FORMATS)
DTYPES = [
    (name, dtype)
    for name in NAMES
    for dtype in ("float32", "bfloat16", "float16")
    if dtype == "float32"
    or FORMATS[name].super_tiles == 1  # two-level grids have float32 products only
]
OUTLIERS = np.random.default_rng(37).standard_normal((304, 32)).astype(np.float32)
OUTLIERS[:, 3] = np.where(np.arange(304) % 2, 5.0, -5.0)


def _grid(name: str, dtype: str = "") -> Grid:
    """The format in tiles of 32, or in those it demands."""
    return Grid(format=name, tile=FORMATS[name].tile or 32, scale_dtype=dtype)


def _unit(name: str) -> int:
    """Elements that are quantized together: a tile, or a super-block."""
    return (FORMATS[name].tile or 32) * FORMATS[name].super_tiles


def _outliers(name: str) -> np.ndarray:
    """Rows of one tile, or of one super-block, with an outlier in every 32."""
    return OUTLIERS.reshape(-1, _unit(name))


@functools.partial(jax.jit, static_argnums=1)
def _plain(w: jax.Array, grid: Grid) -> jax.Array:
    return quantize(w, grid, (1,)).dequantize()


@functools.partial(jax.jit, static_argnums=1)
def _searched(w: jax.Array, grid: Grid) -> tuple[jax.Array, jax.Array]:
    scale = mse_search(w, grid, (1,))
    return scale, quantize(w, grid, (1,), scale).dequantize()


def _error(values: jax.Array, w: np.ndarray) -> np.ndarray:
    """Squared error of each row, in float64."""
    return np.sum(np.square(np.asarray(values, np.float64) - w), axis=1)


@pytest.mark.parametrize("name", NAMES)
def test_search_is_never_worse_than_absmax(name: str) -> None:
    """If it fails, `mse` is a worse start than `rtn` for some tile."""
    grid, w = _grid(name), _outliers(name)
    _, values = _searched(jnp.asarray(w), grid)
    found, plain = _error(values, w), _error(_plain(jnp.asarray(w), grid), w)
    # The search adds its errors up in float32: up to 256 terms, each right to a few parts in 2^24.
    assert (found <= plain * (1 + 1e-5)).all()
    if FORMATS[name].bits == 2:  # at 2 bits the extremum, or the mean, is far from the best step
        assert found.sum() < 0.8 * plain.sum()


@pytest.mark.parametrize(("name", "dtype"), DTYPES)
def test_the_stored_type_of_a_scale(name: str, dtype: str) -> None:
    """If it fails, the scale in the file is not the one the codes were taken against."""
    grid, w = _grid(name, dtype), jnp.asarray(_outliers(name))
    found, values = _searched(w, grid)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, stored(found, grid, 1).astype(jnp.float32))
    off = found * 1.0003  # not representable in 16 bits: rounded before use, in jit too
    run = jax.jit(lambda w, s: quantize(w, grid, (1,), s))
    q = run(w, off)
    assert q.scale.dtype == dtype
    if not grid.two_level:
        np.testing.assert_array_equal(q.scale, off.astype(dtype))
    again = run(w, q.scale.astype(jnp.float32))
    np.testing.assert_array_equal(q.scale, again.scale)
    np.testing.assert_array_equal(q.codes, again.codes)


@pytest.mark.parametrize(("name", "dtype"), DTYPES)
def test_values_on_the_grid_keep_their_codes(name: str, dtype: str) -> None:
    grid = _grid(name, dtype)
    again = jax.jit(lambda w, s: quantize(w, grid, (1,), s))
    q = jax.jit(lambda w: quantize(w, grid, (1,)))(jnp.asarray(_outliers(name)))
    np.testing.assert_array_equal(again(q.dequantize(), q.scale.astype(jnp.float32)).codes, q.codes)


def test_a_code_does_not_depend_on_how_the_scale_is_spread() -> None:
    """If it fails, compilers decide codes: XLA divides by a full array but multiplies by a broadcast reciprocal.

    1.3203125 / 0.203125 is exactly 6.5 and would round to 6; the reciprocal, rounded, makes it 7, everywhere.
    """
    w = jnp.full((32, 1), 1.3203125, jnp.float32)
    for tile in (1, 32):
        scale = jnp.full((32 // tile, 1), 0.203125, jnp.float32)
        grid = Grid(format="int4", tile=tile)
        for run in (quantize, jax.jit(quantize, static_argnums=(1, 2))):
            assert set(run(w, grid, (0,), scale).codes[:, 0].tolist()) == {7}


def test_what_finer_tiles_can_promise() -> None:
    """Not a smaller error tile by tile, but a smaller step, and a smaller error for weights that look like weights."""
    w = np.random.default_rng(41).standard_normal((64, 256)).astype(np.float32)
    steps, plain, searched = [], [], []
    for tile in (256, 64, 16):
        grid = Grid(format="int4", tile=tile)
        q = quantize(jnp.asarray(w), grid, (1,))
        steps.append(np.repeat(q.scale, tile, axis=1))
        miss = np.abs(np.asarray(q.dequantize()) - w)
        # Half a step, or one where +absmax saturates.
        assert (miss <= steps[-1] * np.where(w > 7.5 * steps[-1], 1, 0.5) * (1 + 1e-6)).all()
        plain.append(_error(q.dequantize(), w).sum())
        searched.append(_error(_searched(jnp.asarray(w), grid)[1], w).sum())
    assert (steps[0] >= steps[1]).all() and (steps[1] >= steps[2]).all()
    assert plain[0] > plain[1] > plain[2]
    assert searched[0] > searched[1] > searched[2]
    assert all(s < p for s, p in zip(searched, plain, strict=True))


def test_a_finer_tile_can_be_worse_and_a_shared_scale_never_is() -> None:
    """-8 .. 7 is exact with a step of 1; the half without -8 gets another step. With the same step nothing changes."""
    w = np.asarray([[-8.0, 7, 5, 2, 3, 2, 1, 0]], np.float32)
    coarse, fine = (Grid(format="int4", tile=t) for t in (8, 4))
    assert _error(_plain(jnp.asarray(w), coarse), w) == 0
    assert _error(_plain(jnp.asarray(w), fine), w) > 0
    assert _error(_searched(jnp.asarray(w), fine)[1], w) > 0
    shared = quantize(jnp.asarray(w), fine, (1,), jnp.ones((1, 2)))
    assert _error(shared.dequantize(), w) == 0


@pytest.mark.parametrize(("name", "dtype"), [pair for pair in DTYPES if pair[1] != "bfloat16"])
def test_tiles_too_small_for_their_scale_are_zero_tiles(name: str, dtype: str) -> None:
    """If it fails, a tile is divided by a scale that was flushed to zero."""
    tiny = {"float32": 1e-40, "float16": 1e-9}[dtype]
    w = jnp.asarray([[x] * _unit(name) for x in (tiny, -tiny, 0.0, 1.0)], jnp.float32)
    q = jax.jit(lambda x: quantize(x, _grid(name, dtype), (1,)))(w)
    code = 8 if name == "q4_0" else 0
    scale = 0.0 if name in ("int2_no_zero", "q4_0", "q6_k", "q8_0") else 1.0
    assert set(np.asarray(q.codes[:3]).ravel().tolist()) == {code}
    assert np.abs(q.scale[:3, 0]).tolist() == [scale] * 3
    np.testing.assert_array_equal(q.dequantize()[:3], np.zeros((3, _unit(name))))
    assert (np.asarray(q.dequantize()[3]) > 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_weights_are_their_float32_values(name: str) -> None:
    w = jnp.asarray(_outliers(name)).astype(jnp.bfloat16)
    grid = _grid(name)
    np.testing.assert_array_equal(_plain(w, grid), _plain(w.astype(jnp.float32), grid))


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_non_finite_weights_are_refused_in_one_line(bad: float) -> None:
    w = OUTLIERS.copy()
    w[7, :2] = bad
    with pytest.raises(ValueError, match="layers/2/ffn/up/kernel: 2 of 9728 elements") as caught:
        quantize(jnp.asarray(w), Grid(format="q4_0"), (1,), where="layers/2/ffn/up/kernel")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["int4", "q4_0"])
def test_scales_beyond_float16_are_refused_in_one_line(name: str) -> None:
    w = jnp.full((2, 32), 6e5, jnp.float32)  # a step of 75000, float16 ends at 65504
    grid = Grid(format=name, tile=32, scale_dtype="float16")
    for scale in (None, jnp.full((2, 1), 7e4)):
        with pytest.raises(ValueError, match="embed/table: scales as float16: 2 of 2") as caught:
            quantize(w, grid, (1,), scale, where="embed/table")
        assert "\n" not in str(caught.value)
    wide = Grid(format=name, tile=32, scale_dtype="bfloat16")
    assert bool(jnp.isfinite(quantize(w, wide, (1,)).dequantize()).all())


def test_tiles_that_do_not_divide_say_both_numbers_and_the_place() -> None:
    for call in (quantize, mse_search):
        with pytest.raises(ValueError, match="ffn/up: tile 48 does not divide .* axis of 100"):
            call(jnp.ones((4, 25, 3)), Grid(format="int4", tile=48), (0, 1), where="ffn/up")


def test_reduced_axes_stand_side_by_side() -> None:
    for reduced in ((0, 2), (1, 0), (3,)):
        with pytest.raises(ValueError, match="do not stand next to each other"):
            quantize(jnp.ones((32, 2, 32)), Grid(format="int4"), reduced)
