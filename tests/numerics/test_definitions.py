"""Every format against a second, naive implementation, and against tiles worked out by hand."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from gemma_qat.numerics import FORMATS, Grid, QArray, quantize

NAMES = tuple(FORMATS)
ONE = np.float32(1)
Tile = tuple[np.ndarray, np.ndarray | np.float32 | np.float16, np.ndarray]
"""Codes, scale as stored (one a tile), values."""


def _grid(name: str) -> Grid:
    """The format in tiles of 32, or in those it demands."""
    return Grid(format=name, tile=FORMATS[name].tile or 32)


def _unit(name: str) -> int:
    """Elements that are quantized together: a tile, or a super-block."""
    return (FORMATS[name].tile or 32) * FORMATS[name].super_tiles


def _integer(x: np.ndarray, low: int, high: int, divisor: float) -> Tile:
    scale = np.abs(x).max() * (ONE / np.float32(divisor)) or ONE
    codes = np.clip(np.rint(x * (ONE / scale)), low, high)
    return codes, scale, codes.astype(np.float32) * scale


def _no_zero(x: np.ndarray) -> Tile:
    scale = np.abs(x).max() * np.float32(0.5)
    if scale == 0:
        return np.zeros(x.shape), scale, np.zeros(x.shape, np.float32)
    codes = np.clip(np.rint(x * (ONE / scale) - np.float32(0.5)), -2, 1)
    return codes, scale, (codes.astype(np.float32) + np.float32(0.5)) * scale


def _q4_0(x: np.ndarray) -> Tile:
    largest = np.float32(0)
    for element in x:
        if abs(element) > abs(largest):
            largest = element
    d = largest / np.float32(-8)
    inverse = ONE / d if d else np.float32(0)
    codes = np.minimum(np.trunc(x * inverse + np.float32(8.5)), 15)
    stored = np.float16(d)
    return codes, stored, (codes.astype(np.float32) - 8) * np.float32(stored)


def _ternary(x: np.ndarray) -> Tile:
    total = np.abs(x)
    while len(total) > 1:
        total = total[: len(total) // 2] + total[len(total) // 2 :]
    scale = total[0] * np.float32(1 / len(x)) or ONE
    codes = np.clip(np.rint(x * (ONE / scale)), -1, 1)
    return codes, scale, codes.astype(np.float32) * scale


def _q8_0(x: np.ndarray) -> Tile:
    d = np.abs(x).max() / np.float32(127)
    product = np.float64(x * (ONE / d if d else np.float32(0)))
    codes = np.trunc(product + np.copysign(0.5, product))
    stored = np.float16(d)
    return codes, stored, codes.astype(np.float32) * np.float32(stored)


def _q6_k(x: np.ndarray) -> Tile:
    tiles = x.reshape(16, 16)
    raw = tiles[np.arange(16), np.abs(tiles).argmax(1)] / np.float32(-32)
    top = raw[np.abs(raw).argmax()]
    if top == 0:
        return np.zeros(256), np.zeros(16), np.zeros(256)
    inverse = np.float32(-128) * (ONE / top)
    d = np.float32(np.float16(ONE / inverse))
    scales = d * np.clip(np.rint(inverse * raw), -128, 127)
    codes = np.zeros((16, 16))
    for tile, scale in enumerate(scales):
        if scale:
            codes[tile] = np.clip(np.rint(tiles[tile] * (ONE / scale)), -32, 31)
    return codes.ravel(), scales, (codes.astype(np.float32) * scales[:, None]).ravel()


REFERENCE: dict[str, Callable[[np.ndarray], Tile]] = {
    "int2": lambda x: _integer(x, -2, 1, 2),
    "int2_no_zero": _no_zero,
    "int4": lambda x: _integer(x, -8, 7, 8),
    "int8": lambda x: _integer(x, -128, 127, 127),
    "q4_0": _q4_0,
    "ternary": _ternary,
    "q6_k": _q6_k,
    "q8_0": _q8_0,
}


def _tiles(width: int) -> np.ndarray:
    """Rows of tiles: whatever a tile can look like."""
    rng = np.random.default_rng(11)
    normal = rng.standard_normal((200, width))
    ties = 0.5 * rng.integers(-16, 17, (200, width))
    ties[:, 0] = rng.choice([-8.0, 8.0], 200)
    lonely = np.zeros((width, width))
    np.fill_diagonal(lonely, rng.standard_normal(width))
    opposite = rng.uniform(-1, 1, (50, width))
    opposite[:, 5], opposite[:, 20] = 1.0, -1.0
    rows = [
        normal, np.abs(normal), -np.abs(normal), 1e3 * normal, 1e-3 * normal, np.zeros((2, width)),
        ties, 0.1 * ties, 0.037 * ties, (0.037 * ties).astype(ml_dtypes.bfloat16),
        normal.astype(ml_dtypes.bfloat16), lonely, opposite, -opposite,
    ]  # fmt: skip
    return np.concatenate([np.asarray(r, np.float32) for r in rows])


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_tile_against_the_naive_quantizer(name: str) -> None:
    """If it fails, the jitted quantizer rounds, scales or decodes otherwise than the table of formats says."""
    w = _tiles(_unit(name))
    q = jax.jit(lambda x: quantize(x, _grid(name), (1,)))(jnp.asarray(w))
    codes, scales, values = zip(*(REFERENCE[name](row) for row in w), strict=True)
    np.testing.assert_array_equal(q.codes, np.stack(codes))
    np.testing.assert_array_equal(np.ravel(q.scale), np.hstack(scales))
    np.testing.assert_array_equal(jax.jit(QArray.dequantize)(q), np.stack(values))


BY_HAND = {
    # 2 saturates at 1, -2 does not: the negative side reaches one code further. Halves go to the even code.
    "int2": ([2, -2, -1.5, -1, -0.5, 0.5, 0.6, 1.5], [1, -2, -2, -1, 0, 0, 1, 1]),
    # No code stands for zero: 0 is a tie between -0.5 and 0.5, and goes to the even code 0.
    "int2_no_zero": ([2, -2, -1.1, -1, -0.1, 0, 1, 1.1], [1, -2, -2, -2, -1, 0, 0, 1]),
    "int4": ([8, -8, -7.5, -2.5, -0.5, 1.5, 2.5, 6.5], [7, -8, -8, -2, 0, 2, 2, 6]),
    "int8": ([127, -127, -126.5, -1.5, -0.5, 0.5, 1.5, 125.5], [127, -127, -126, -2, 0, 0, 2, 126]),
    # The magnitudes add up to 32, so their mean is 1; one and a half would be 2 and saturates.
    "ternary": ([9, -9, 1.5, -1.5, 0.5, -0.5, 1, -9], [1, -1, 1, -1, 0, 0, 1, -1]),
    # The extremum -32 gives a scale of 1 = -128 * d, the other tiles of the super-block scales of 0.
    "q6_k": ([-32, 31.5, 30.5, 0.5, 1.5, -0.5, -31.5, 32], [-32, 31, 30, 0, 2, 0, -32, 31]),
    # Halves go away from zero.
    "q8_0": (
        [127, -127, -126.5, -1.5, -0.5, 0.5, 1.5, 125.5],
        [127, -127, -127, -2, -1, 1, 2, 126],
    ),
    # The extremum -8 gives d = 1; halves go up: -0.5 to code 8 (value 0), 0.5 to code 9 (value 1).
    "q4_0": ([-8, 7.5, 7.4, 0.5, -0.5, -7.5, 8, 0], [0, 15, 15, 9, 8, 1, 15, 8]),
}


@pytest.mark.parametrize("name", NAMES)
def test_tiles_by_hand(name: str) -> None:
    """If it fails, ties or the far end of a lopsided grid moved. Every tile here has a scale of exactly 1."""
    weights, codes = BY_HAND[name]
    w = np.zeros((_unit(name), 1), np.float32)
    w[:8, 0] = weights
    q = quantize(jnp.asarray(w), Grid(format=name), (0,))
    assert q.codes[:8, 0].tolist() == codes
    assert q.scale[:, 0].tolist() == [1.0] + [0.0] * (FORMATS[name].super_tiles - 1)
    assert set(q.codes[8:, 0].tolist()) == {8 if name == "q4_0" else 0}


def test_the_mobile_divisor_uses_the_lowest_code_at_eight_bits() -> None:
    w = jnp.asarray([[128.0], [-128.0], [-127.5], [0.5]])
    q = quantize(w, Grid(format="int8", divisor=128.0), (0,))
    assert q.codes[:, 0].tolist() == [127, -128, -128, 0]


@pytest.mark.parametrize(
    ("weights", "d", "codes"),
    [
        # A positive extremum makes d negative: the tile is mirrored, ties now go down in value.
        ([8.0, -7.5, 0.5, -0.5], -1.0, [0, 15, 8, 9]),
        # Of two extrema the first decides; the other one saturates one step short.
        ([8.0, -8.0, 1.0, 0.0], -1.0, [0, 15, 7, 8]),
        ([-8.0, 8.0, 1.0, 0.0], 1.0, [0, 15, 9, 8]),
        # One-sided tiles use half of the codes.
        ([4.0, 2.0, 3.0, 0.0], -0.5, [0, 4, 2, 8]),
        ([-4.0, -2.0, -3.0, 0.0], 0.5, [0, 4, 2, 8]),
    ],
)
def test_the_sign_of_d(weights: list[float], d: float, codes: list[int]) -> None:
    """If it fails, a q4_0 tile hangs on the wrong end of its grid."""
    w = np.zeros((32, 1), np.float32)
    w[: len(weights), 0] = weights
    q = quantize(jnp.asarray(w), Grid(format="q4_0"), (0,))
    assert float(q.scale[0, 0]) == d
    assert q.codes[: len(codes), 0].tolist() == codes


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("shape", "reduced"),
    [((64,), (0,)), ((64, 3), (0,)), ((4, 16, 3), (0, 1)), ((3, 64, 2), (1,)), ((3, 2, 64), (2,))],
)
def test_tiles_follow_the_reduced_axes(
    name: str, shape: tuple[int, ...], reduced: tuple[int, ...]
) -> None:
    """If it fails, an element is divided by the scale of another tile."""
    unit, tiles = _unit(name), FORMATS[name].super_tiles
    shape = tuple(n * unit // 32 if axis == reduced[-1] else n for axis, n in enumerate(shape))
    w = np.random.default_rng(13).standard_normal(shape).astype(np.float32)
    q = jax.jit(lambda x: quantize(x, _grid(name), reduced))(jnp.asarray(w))
    lead, trail = shape[: reduced[0]], shape[reduced[-1] + 1 :]
    assert q.scale.shape == (*lead, 2 * tiles, *trail)
    merged = (*lead, 2 * unit, *trail)
    for outer in np.ndindex(lead):
        for inner in np.ndindex(trail):
            at = (*outer, slice(None), *inner)
            column, codes = w.reshape(merged)[at], np.asarray(q.codes).reshape(merged)[at]
            for tile in range(2):
                part = slice(unit * tile, unit * tile + unit)
                expected, scale, _ = REFERENCE[name](column[part])
                np.testing.assert_array_equal(codes[part], expected)
                found = np.asarray(q.scale)[
                    (*outer, slice(tiles * tile, tiles * tile + tiles), *inner)
                ]
                np.testing.assert_array_equal(found, np.ravel(scale))


def test_one_scale_a_channel_is_one_tile_of_the_whole_axis() -> None:
    w = jnp.asarray(np.random.default_rng(17).standard_normal((37, 5)), jnp.float32)
    channel, tile = (quantize(w, Grid(format="int4", tile=t), (0,)) for t in (None, 37))
    assert channel.scale.shape == (1, 5)
    np.testing.assert_array_equal(channel.codes, tile.codes)
    np.testing.assert_array_equal(channel.scale, tile.scale)
