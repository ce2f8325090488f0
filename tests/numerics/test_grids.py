"""Every format and layout: definitions by hand, packing there and back, what is refused."""

from __future__ import annotations

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

NAMES = tuple(FORMATS)


def naive(w: np.ndarray, scale: float, name: str) -> np.ndarray:
    """The definition, one element at a time in float64."""
    fmt = FORMATS[name]
    out = []
    for x in w:
        raw = x / scale + fmt.zero
        code = np.floor(raw + 0.5) if fmt.ties == "up" else np.round(raw)
        out.append(min(max(code, fmt.code_min), fmt.code_max))
    return np.asarray(out, np.int8)


@pytest.mark.parametrize(
    ("name", "weights", "scale", "codes"),
    [
        ("int2", [-2.6, -1.5, -0.5, 0.5, 0.6, 1.5, 9.0], 1.0, [-2, -2, 0, 0, 1, 1, 1]),
        ("int2_no_zero", [-9.0, -1.5, -0.4, 0.4, 1.5, 9.0], 1.0, [-2, -2, -1, 0, 1, 1]),
        ("int4", [-8.6, -2.5, -1.5, 0.5, 1.5, 7.6], 1.0, [-8, -2, -2, 0, 2, 7]),
        ("int8", [-300.0, -0.5, 1.5, 300.0], 1.0, [-128, 0, 2, 127]),
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
    w = (magnitude * rng.standard_normal((32, 7))).astype(np.float32)
    q = jax.jit(lambda x: quantize(x, Grid(format=name), (0,)))(jnp.asarray(w))
    for column in range(7):
        column_w = w[:, column]
        if name == "q4_0":
            scale = column_w[np.argmax(np.abs(column_w))] / -8
        else:
            scale = np.float32(np.abs(column_w).max() / np.float32(FORMATS[name].divisor))
        np.testing.assert_array_equal(
            q.codes[:, column], naive(column_w.astype(np.float64), float(scale), name)
        )
    values = (np.asarray(q.codes, np.float32) - FORMATS[name].zero) * np.asarray(
        q.scale, np.float32
    )
    np.testing.assert_array_equal(q.dequantize(), values)


@pytest.mark.parametrize("name", NAMES)
def test_a_tile_of_zeros(name: str) -> None:
    q = quantize(jnp.zeros((64, 3)), Grid(format=name, tile=32), (0,))
    np.testing.assert_array_equal(q.dequantize(), np.zeros((64, 3)))
    expected = {"q4_0": (8, 0.0), "int2_no_zero": (0, 0.0)}.get(name, (0, 1.0))
    assert (int(q.codes[0, 0]), float(q.scale[0, 0])) == expected


SHAPES = [
    ((1, 3), (0,)), ((7, 5), (0,)), ((5, 31), (1,)), ((33, 2), (0,)), ((3, 4, 5), (0,)), ((2, 3, 5), (0, 1)),
    ((3, 13, 2), (1,)), ((5, 2, 9), (2,)), ((64, 3), (0,)), ((3, 96), (1,)), ((2, 16, 3), (0, 1)), ((2, 64, 5), (1,)),
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("shape", "reduced"), SHAPES)
def test_packing_there_and_back(
    name: str, shape: tuple[int, ...], reduced: tuple[int, ...]
) -> None:
    """If it fails, a stored code is not the code that was trained."""
    length = int(np.prod([shape[axis] for axis in reduced]))
    if name == "q4_0" and length % 32:
        with pytest.raises(
            ValueError, match=f"tile 32 does not divide the reduced axis of {length}"
        ):
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
    w = jnp.asarray(
        rng.standard_normal((64, 40)) * np.exp(rng.standard_normal((64, 40))), jnp.float32
    )
    grid = Grid(format=name, tile=32, scale_dtype="float16")
    scale = mse_search(w, grid, (0,))
    np.testing.assert_array_equal(scale, scale.astype(jnp.float16).astype(jnp.float32))

    def error(x: jax.Array) -> np.ndarray:
        return np.sum(np.square(np.asarray(x - w)).reshape(2, 32, 40), axis=1)

    searched = error(quantize(w, grid, (0,), scale).dequantize())
    # Codes against the stored scale, as the search sees them; ggml's own absmax codes use the unrounded one.
    stored = quantize(w, grid, (0,)).scale
    plain = error(quantize(w, grid, (0,), stored).dequantize())
    assert (searched <= plain * (1 + 1e-6)).all()
    assert searched.sum() < 0.9 * plain.sum() if FORMATS[name].bits == 2 else True


@pytest.mark.parametrize("name", NAMES)
def test_quantizing_again_changes_nothing(name: str) -> None:
    w = jnp.asarray(np.random.default_rng(4).standard_normal((64, 9)), jnp.float32)
    grid = Grid(format=name, tile=32, scale_dtype="float16")
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
    q = quantize(jnp.full((32, 1), 1e-44, jnp.float32), Grid(format=name), (0,))
    np.testing.assert_array_equal(q.dequantize(), np.zeros((32, 1)))


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
