"""Every format and layout: definitions by hand, packing there and back, what is refused."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_qat.errors import InputError
from gemma_qat.numerics import (
    FORMATS,
    Grid,
    PackedArray,
    format_named,
    layout_named,
    mse_search,
    pack,
    quantize,
)
from gemma_qat.numerics.scales import stored

NAMES = tuple(FORMATS)


def _grid(name: str) -> Grid:
    """The format in tiles of 32, or in those it demands."""
    return Grid(format=name, tile=FORMATS[name].tile or 32)


def _unit(name: str) -> int:
    """Elements that are quantized together: a tile, or a super-block."""
    return (FORMATS[name].tile or 32) * FORMATS[name].super_tiles


def _half(name: str) -> Grid:
    """The same with float16 scales; a two-level grid has its own."""
    dtype = "float32" if FORMATS[name].super_tiles > 1 else "float16"
    return dataclasses.replace(_grid(name), scale_dtype=dtype)


def naive(w: np.ndarray, scale: np.ndarray, name: str) -> np.ndarray:
    """The definition, one element at a time in float64."""
    fmt = FORMATS[name]
    out = []
    for x, s in zip(w, np.broadcast_to(scale, w.shape), strict=True):
        raw = x / s + fmt.zero
        code = np.floor(raw + 0.5) if fmt.ties == "up" else np.round(raw)
        if fmt.ties == "away":
            code = np.trunc(raw + np.copysign(0.5, raw))
        out.append(min(max(code, fmt.code_min), fmt.code_max))
    return np.asarray(out, np.int8)


@pytest.mark.parametrize(
    ("name", "weights", "scale", "codes"),
    [
        ("int2", [-2.6, -1.5, -0.5, 0.5, 0.6, 1.5, 9.0], 1.0, [-2, -2, 0, 0, 1, 1, 1]),
        ("int2_no_zero", [-9.0, -1.5, -0.4, 0.4, 1.5, 9.0], 1.0, [-2, -2, -1, 0, 1, 1]),
        ("int4", [-8.6, -2.5, -1.5, 0.5, 1.5, 7.6], 1.0, [-8, -2, -2, 0, 2, 7]),
        ("int8", [-300.0, -0.5, 1.5, 300.0], 1.0, [-128, 0, 2, 127]),
        ("ternary", [-9.0, -1.5, -0.6, -0.5, 0.5, 1.5], 1.0, [-1, -1, -1, 0, 0, 1]),
    ],
)
def test_codes_by_hand(name: str, weights: list[float], scale: float, codes: list[int]) -> None:
    """If it fails, a number rounds to another code than the format says."""
    w = jnp.asarray(weights, jnp.float32)
    q = quantize(w, Grid(format=name), (0,), jnp.full((1,), scale))
    assert q.codes.tolist() == codes


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 50.0])
def test_against_the_definition(name: str, magnitude: float) -> None:
    rng = np.random.default_rng(5)
    w = (magnitude * rng.standard_normal((_unit(name), 7))).astype(np.float32)
    q = jax.jit(lambda x: quantize(x, Grid(format=name), (0,)))(jnp.asarray(w))
    for column in range(7):
        column_w = w[:, column]
        if name == "q4_0":
            scale = column_w[np.argmax(np.abs(column_w))] / -8
        elif name == "q6_k":
            scale = np.repeat(q.scale[:, column], 16)
        elif name == "ternary":
            scale = np.abs(column_w).mean(dtype=np.float64)
        else:
            scale = np.float32(np.abs(column_w).max() / np.float32(FORMATS[name].divisor))
        np.testing.assert_array_equal(
            q.codes[:, column], naive(column_w.astype(np.float64), np.float64(scale), name)
        )
    scales = np.repeat(np.asarray(q.scale, np.float32), len(w) // len(q.scale), axis=0)
    values = (np.asarray(q.codes, np.float32) - FORMATS[name].zero) * scales
    np.testing.assert_array_equal(q.dequantize(), values)


@pytest.mark.parametrize("name", NAMES)
def test_a_tile_of_zeros(name: str) -> None:
    shape = (2 * _unit(name), 3)
    q = quantize(jnp.zeros(shape), _grid(name), (0,))
    np.testing.assert_array_equal(q.dequantize(), np.zeros(shape))
    expected = {
        "q4_0": (8, 0.0), "int2_no_zero": (0, 0.0), "q6_k": (0, 0.0), "q8_0": (0, 0.0),
    }.get(name, (0, 1.0))  # fmt: skip
    assert (int(q.codes[0, 0]), float(q.scale[0, 0])) == expected


SHAPES = [
    ((7, 5), (0,)), ((5, 31), (1,)), ((2, 3, 5), (0, 1)), ((64, 3), (0,)), ((3, 96), (1,)), ((512, 2), (0,)),
    ((3, 2, 128, 2), (1, 2)),
]  # fmt: skip
MORE_SHAPES = [
    ((1, 3), (0,)), ((33, 2), (0,)), ((3, 4, 5), (0,)), ((3, 13, 2), (1,)), ((5, 2, 9), (2,)), ((2, 16, 3), (0, 1)),
    ((2, 64, 5), (1,)), ((2, 3, 256), (2,)),
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("shape", "reduced"),
    [*SHAPES, *(pytest.param(*shape, marks=pytest.mark.slow) for shape in MORE_SHAPES)],
)
def test_packing_there_and_back(
    name: str, shape: tuple[int, ...], reduced: tuple[int, ...]
) -> None:
    """If it fails, a stored code is not the code that was trained."""
    length = int(np.prod([shape[axis] for axis in reduced]))
    if FORMATS[name].tile and length % _unit(name):
        kind = "super-block" if FORMATS[name].super_tiles > 1 else "tile"
        line = f"array: {kind} {_unit(name)} does not divide the reduced axis of {length}"
        with pytest.raises(ValueError, match=line):
            quantize(jnp.ones(shape), Grid(format=name), reduced)
        return
    w = jnp.asarray(np.random.default_rng(1).standard_normal(shape), jnp.float32)
    q = quantize(w, Grid(format=name), reduced)
    packed = pack(q)
    again = packed.unpack()
    np.testing.assert_array_equal(again.codes, q.codes)
    np.testing.assert_array_equal(again.scale, q.scale)
    np.testing.assert_array_equal(packed.dequantize(), q.dequantize())
    assert packed.words.dtype == jnp.uint8
    assert packed.words.size == w.size // length * -(-length * FORMATS[name].bits // 8)


def test_bits_sit_where_other_readers_look() -> None:
    layout = layout_named("little", 4)
    words = layout.pack(jnp.arange(8, dtype=jnp.uint8), 4)
    assert np.asarray(words).view("<u4").tolist() == [0x76543210]
    words = layout_named("little", 2).pack(jnp.asarray([0, 1, 2, 3] * 4, jnp.uint8), 2)
    assert np.asarray(words).view("<u4").tolist() == [0xE4E4E4E4]
    words = layout_named("ggml_nibbles", 4).pack(jnp.arange(32, dtype=jnp.uint8) % 16, 4)
    assert np.asarray(words).tolist() == [j | (j << 4) for j in range(16)]


@pytest.mark.parametrize("name", NAMES)
def test_searched_scales_are_never_worse(name: str) -> None:
    rng = np.random.default_rng(2)
    shape = (2 * _unit(name), 40)
    w = jnp.asarray(rng.standard_normal(shape) * np.exp(rng.standard_normal(shape)), jnp.float32)
    grid = _half(name)
    scale = mse_search(w, grid, (0,))
    np.testing.assert_array_equal(scale, stored(scale, grid, 0).astype(jnp.float32))

    def error(x: jax.Array) -> np.ndarray:
        return np.sum(np.square(np.asarray(x - w)).reshape(2, -1, 40), axis=1)

    searched = error(quantize(w, grid, (0,), scale).dequantize())
    # Codes against the stored scale, as the search sees them; ggml's own absmax codes use the unrounded one.
    plain = error(quantize(w, grid, (0,), quantize(w, grid, (0,)).scale).dequantize())
    assert (searched <= plain * (1 + 1e-6)).all()
    assert searched.sum() < 0.9 * plain.sum() if FORMATS[name].bits == 2 else True


@pytest.mark.parametrize("name", NAMES)
def test_quantizing_again_changes_nothing(name: str) -> None:
    w = jnp.asarray(np.random.default_rng(4).standard_normal((2 * _unit(name), 9)), jnp.float32)
    grid = _half(name)
    q = quantize(w, grid, (0,))
    np.testing.assert_array_equal(
        quantize(q.dequantize(), grid, (0,), q.scale.astype(jnp.float32)).codes, q.codes
    )


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    w = np.ones((32, 2), np.float32)
    w[3, 1] = bad
    with pytest.raises(ValueError, match="embed/table: 1 of 64 elements are inf or nan"):
        quantize(jnp.asarray(w), Grid(format="int4"), (0,), where="embed/table")


@pytest.mark.parametrize("name", NAMES)
def test_scales_too_small_for_float32_make_zero_tiles(name: str) -> None:
    w = jnp.full((_unit(name), 1), 1e-44, jnp.float32)
    q = quantize(w, Grid(format=name), (0,))
    np.testing.assert_array_equal(q.dequantize(), np.zeros(w.shape))


def test_rows_of_a_packed_table() -> None:
    w = jnp.asarray(np.random.default_rng(6).standard_normal((11, 3, 64)), jnp.float32)
    packed = pack(quantize(w, Grid(format="q4_0"), (2,)))
    ids = jnp.asarray([[4, 0], [10, 4]])
    np.testing.assert_array_equal(packed.rows(ids).dequantize(), packed.dequantize()[ids])


def test_a_stack_of_packed_arrays_scans_and_maps() -> None:
    w = jnp.asarray(np.random.default_rng(8).standard_normal((3, 64, 5)), jnp.float32)
    parts = [pack(quantize(x, Grid(format="int4"), (0,))) for x in w]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
    _, scanned = jax.lax.scan(lambda _, part: (None, part.dequantize()), None, stack)
    mapped = jax.vmap(PackedArray.dequantize)(stack)
    expected = np.stack([part.dequantize() for part in parts])
    np.testing.assert_array_equal(scanned, expected)
    np.testing.assert_array_equal(mapped, expected)


def test_unknown_names_say_what_is_near() -> None:
    with pytest.raises(InputError, match="nearest: int4"):
        format_named("int44")
    with pytest.raises(InputError, match="float16"):
        Grid(format="int4", scale_dtype="fp16")
    with pytest.raises(ValueError, match="tile 16 given, 32 expected"):
        Grid(format="q4_0", tile=16)
    with pytest.raises(ValueError, match="q6_k: float16 scales given, float32 expected"):
        Grid(format="q6_k", scale_dtype="float16")
