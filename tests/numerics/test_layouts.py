"""Bit layouts: there and back for every width and odd length, and byte by byte against a naive packer."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from gemma_qat.errors import InputError
from gemma_qat.numerics import FORMATS, LAYOUTS, Grid, PackedArray, QArray, layout_named, pack
from gemma_qat.numerics import quantize as quantize_array

LENGTHS = (1, 3, 7, 31, 32, 33, 64, 96)
LONG = (1, 33, 255, 256, 257, 512)
"""For blocks of 256."""


def _grid(name: str) -> Grid:
    """The format in tiles of 32, or in those it demands."""
    return Grid(format=name, tile=FORMATS[name].tile or 32)


def _unit(name: str) -> int:
    """Elements that are quantized together: a tile, or a super-block."""
    return (FORMATS[name].tile or 32) * FORMATS[name].super_tiles


PAIRS = [(name, bits) for name, layout in LAYOUTS.items() for bits in layout.bits]


def _little(codes: np.ndarray, bits: int) -> list[int]:
    """The bit stream, one bit at a time."""
    stream = [int(code) >> bit & 1 for code in codes for bit in range(bits)]
    stream += [0] * (-len(stream) % 8)
    return [
        sum(bit << i for i, bit in enumerate(stream[at : at + 8]))
        for at in range(0, len(stream), 8)
    ]


def _ggml_nibbles(codes: np.ndarray, bits: int) -> list[int]:
    assert bits == 4
    padded = [int(code) for code in codes] + [0] * (-len(codes) % 32)
    out = []
    for block in range(0, len(padded), 32):
        out += [padded[block + j] + 16 * padded[block + j + 16] for j in range(16)]
    return out


def _ggml_q6_k(codes: np.ndarray, bits: int) -> list[int]:
    """The loops of `quantize_row_q6_K_ref`, with its names."""
    assert bits == 6
    padded = [int(code) for code in codes] + [0] * (-len(codes) % 256)
    out = []
    for block in range(0, len(padded), 256):
        ql, qh = [0] * 128, [0] * 64
        for half in range(2):
            part = padded[block + 128 * half : block + 128 * half + 128]
            for j in range(32):
                q1, q2, q3, q4 = part[j], part[j + 32], part[j + 64], part[j + 96]
                ql[64 * half + j] = (q1 & 15) | ((q3 & 15) << 4)
                ql[64 * half + j + 32] = (q2 & 15) | ((q4 & 15) << 4)
                qh[32 * half + j] = (
                    (q1 >> 4) | ((q2 >> 4) << 2) | ((q3 >> 4) << 4) | ((q4 >> 4) << 6)
                )
        out += ql + qh
    return out


NAIVE = {"little": _little, "ggml_nibbles": _ggml_nibbles, "ggml_q6_k": _ggml_q6_k}


@pytest.mark.parametrize(("name", "bits"), PAIRS)
def test_bytes_there_and_back(name: str, bits: int) -> None:
    """If it fails, a stored code comes back as another, or lies where no other reader looks."""
    layout = layout_named(name, bits)
    rng = np.random.default_rng(19)
    for length in LONG if name == "ggml_q6_k" else LENGTHS:
        codes = rng.integers(0, 2**bits, (2, length)).astype(np.uint8)
        # Compiled as one: op by op the lengths would each compile a dozen kernels.
        there = jax.jit(functools.partial(layout.pack, bits=bits))(jnp.asarray(codes))
        np.testing.assert_array_equal(there, [NAIVE[name](row, bits) for row in codes])
        back = jax.jit(functools.partial(layout.unpack, bits=bits, length=length))(there)
        np.testing.assert_array_equal(back, codes)


def _row(name: str, codes: list[int]) -> QArray:
    grid = Grid(format=name)
    scale = jnp.ones((1,), grid.scale_dtype)
    return QArray(codes=jnp.asarray(codes, jnp.int8), scale=scale, grid=grid, reduced=(0,))


@pytest.mark.parametrize(
    ("name", "codes", "word"),
    [
        ("int4", [-8, -7, -6, -5, -4, -3, -2, -1], 0x76543210),
        ("int4", [0, 1, 2, 3, 4, 5, 6, 7], 0xFEDCBA98),
        ("int2", [-2, -1, 0, 1] * 4, 0xE4E4E4E4),
        ("int2_no_zero", [1, 0, -1, -2] * 4, 0x1B1B1B1B),
        ("int8", [-128, -1, 0, 127], 0xFF807F00),
        ("q8_0", [-128, -1, 0, 127], 0xFF807F00),
        ("ternary", [-1, 0, 1, 0] * 4, 0x64646464),
    ],
)
def test_words_by_hand(name: str, codes: list[int], word: int) -> None:
    """If it fails, int32 words are not offset binary with the first code in the lowest bits."""
    assert np.asarray(pack(_row(name, codes)).words).view("<u4").tolist() == [word]


def test_nibbles_are_ggmls_bytes() -> None:
    """The block format's own reader finds each code where we put it."""
    codes = np.random.default_rng(23).integers(0, 16, 96)
    words = np.asarray(pack(_row("q4_0", codes.tolist())).words).reshape(3, 16)
    scale = np.full((3, 1), 1, np.float16).view(np.uint8).reshape(3, 2)
    blocks = np.concatenate([scale, words], axis=-1)
    values = quants.dequantize(blocks, GGMLQuantizationType.Q4_0)
    np.testing.assert_array_equal(values.reshape(96), codes.astype(np.float32) - 8)


SHAPES = [
    *[((n,), (0,)) for n in LENGTHS], *[((n, 3), (0,)) for n in LENGTHS],
    ((5, 7, 3), (1,)), ((2, 3, 31), (2,)), ((3, 11, 2), (0, 1)), ((3, 32, 2), (0, 1)),
    ((2, 96, 3), (1,)), ((2, 3, 64), (2,)), ((2, 3, 5, 16), (2, 3)),
]  # fmt: skip


LARGE = [
    ((256,), (0,)), ((512, 3), (0,)), ((5, 256, 3), (1,)), ((2, 3, 512), (2,)), ((3, 2, 128, 2), (1, 2)),
]  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_packed_arrays_there_and_back(name: str) -> None:
    """If it fails, packing moves a code to another place for some order of axes."""
    rng, fmt = np.random.default_rng(29), FORMATS[name]
    for shape, reduced in LARGE if fmt.super_tiles > 1 else SHAPES:
        length = int(np.prod([shape[axis] for axis in reduced]))
        if fmt.tile and length % _unit(name):
            continue
        grid = Grid(format=name)
        codes = rng.integers(fmt.code_min, fmt.code_max + 1, shape).astype(np.int8)
        lead, trail = shape[: reduced[0]], shape[reduced[-1] + 1 :]
        scale = rng.uniform(0.5, 2, (*lead, grid.tiles(length), *trail))
        q = QArray(
            codes=jnp.asarray(codes), scale=jnp.asarray(scale, grid.scale_dtype),
            grid=grid, reduced=reduced,
        )  # fmt: skip
        packed = jax.jit(pack)(q)
        assert packed.words.shape[:-1] == (*lead, *trail)
        assert packed.scale.shape == (*lead, *trail, grid.tiles(length))
        again = jax.jit(PackedArray.unpack)(packed)
        np.testing.assert_array_equal(again.codes, codes, err_msg=f"{shape} {reduced}")
        np.testing.assert_array_equal(again.scale, q.scale, err_msg=f"{shape} {reduced}")


def test_what_a_packed_weight_weighs() -> None:
    w = jnp.ones((256, 3))
    sizes = {n: pack(quantize_array(w, _grid(n), (0,))).nbytes for n in FORMATS}
    # Words, then eight scales for each of three columns: 18 or 34 bytes a block of 32 for q4_0 and q8_0, float32 for
    # the others. The 16 scales of q6_k are held as float32 products.
    assert sizes == {
        "int2": 192 + 96, "int2_no_zero": 192 + 96, "ternary": 192 + 96, "int4": 384 + 96, "int8": 768 + 96,
        "q4_0": 24 * 18, "q8_0": 24 * 34, "q6_k": 3 * 192 + 3 * 64,
    }  # fmt: skip


def test_stored_bits_a_weight() -> None:
    """If it fails, sizes are reported that no file has."""
    bits = {name: _grid(name).bits_per_weight(512) for name in FORMATS}
    assert bits == {
        "int2": 3, "int2_no_zero": 3, "ternary": 3, "int4": 5, "int8": 9,
        "q4_0": 18 * 8 / 32, "q8_0": 34 * 8 / 32, "q6_k": 210 * 8 / 256,
    }  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_rows_scan_and_vmap(name: str) -> None:
    """If it fails, look-ups or stacked layers decode other numbers than the table they come from."""
    rng = np.random.default_rng(31)
    w = jnp.asarray(rng.standard_normal((3, 11, 2 * _unit(name))), jnp.float32)
    grid = _grid(name)
    stack = jax.jit(jax.vmap(lambda x: pack(quantize_array(x, grid, (1,)))))(w)
    one_by_one = [jax.jit(lambda x: pack(quantize_array(x, grid, (1,))))(x) for x in w]
    values = np.stack([jax.jit(PackedArray.dequantize)(one) for one in one_by_one])
    assert stack.shape == w.shape[1:]
    np.testing.assert_array_equal(jax.jit(jax.vmap(PackedArray.dequantize))(stack), values)
    _, scanned = jax.lax.scan(lambda c, part: (c, part.dequantize()), 0, stack)
    np.testing.assert_array_equal(scanned, values)
    ids = jnp.asarray([[4, 0, 10], [10, 4, 4]])
    looked_up = jax.jit(lambda p, i: p.rows(i).dequantize())(one_by_one[1], ids)
    np.testing.assert_array_equal(looked_up, values[1][np.asarray(ids)])


def test_rows_need_the_reduced_axis_last() -> None:
    packed = pack(quantize_array(jnp.ones((32, 5)), Grid(format="int4"), (0,)))
    with pytest.raises(ValueError, match=r"rows of shape \(32, 5\): the last axis must be"):
        packed.rows(jnp.asarray([1]))


def test_layouts_that_do_not_exist() -> None:
    with pytest.raises(InputError, match="nearest: little"):
        layout_named("litle", 4)
    with pytest.raises(ValueError, match="layout ggml_nibbles: 2 bits given"):
        layout_named("ggml_nibbles", 2)
