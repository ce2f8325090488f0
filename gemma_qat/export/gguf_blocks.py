"""The bytes of quantized GGUF tensors: one table of grids, ggml's types and how a block is laid out.

GGUF keeps torch's order, [out, in] with the reduced axis last, which is also the order of a
`PackedArray`. A quantized tensor therefore needs no transposition of codes at all: pack it, put
words and scales of each block together, and merge axes.

| grid | type | elements | bytes of a block |
|---|---|---|---|
| q4_0 | Q4_0 | 32 | d float16, 16 of `ggml_nibbles` |
| q8_0 | Q8_0 | 32 | d float16, 32 codes as int8 (ours are offset binary: the top bit flips) |
| int2, tile 64, float16 | Q2_0 | 64 | d float16 = -scale, 16 of `little`, code 1 - c (all bits flip) |
| q6_k | Q6_K | 256 | 192 of `ggml_q6_k`, sc int8 of 16 tiles, d float16 |

Q2_0 has the values (code - 1) * d: -1 0 1 2 times d. With d the negated scale that is the grid -2 -1 0 1, exactly.

Numbers are little endian. The scale of a q6_k tile is d * sc in float32; the largest of a
super-block has sc = -128, so d is that scale / -128 and every sc a scale / d, all exact.

Source: `block_q4_0`, `block_q8_0`, `block_q2_0`, `block_q6_K` in ggml-common.h (ggml-org/llama.cpp).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, UInt8

from gemma_qat.errors import InputError
from gemma_qat.export.gguf_map import Tensor
from gemma_qat.numerics import Grid, PackedArray, QArray, pack, scale_shape
from gemma_qat.numerics.tiles import split_axes
from gemma_qat.quant.sites import Parameter

Bytes = UInt8[np.ndarray, "..."]
Scales = Float[np.ndarray, "..."]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    """One of ggml's quantized types, and the grid whose codes and scales it holds.

    Shapes: encode(words [..., words of a block], scales [..., tiles of a block]) -> [..., size] bytes, and decode the
        other way round.
    """

    name: str
    """Name of the type, as gguf-py gives it."""
    grid: Grid
    elements: int
    size: int
    encode: Callable[[Bytes, Scales], Bytes]
    decode: Callable[[Bytes], tuple[Bytes, Scales]]


def _d_bytes(d: Scales) -> Bytes:
    return np.ascontiguousarray(d, "<f2").view(np.uint8)


def _d_of(data: Bytes) -> Scales:
    return np.ascontiguousarray(data).view("<f2").astype(np.float16, copy=False)


def _encode_q4_0(words: Bytes, scale: Scales) -> Bytes:
    return np.concatenate([_d_bytes(scale), words], axis=-1)


def _decode_q4_0(data: Bytes) -> tuple[Bytes, Scales]:
    return data[..., 2:], _d_of(data[..., :2])


_SIGN = np.uint8(128)


def _encode_q8_0(words: Bytes, scale: Scales) -> Bytes:
    return np.concatenate([_d_bytes(scale), words ^ _SIGN], axis=-1)


def _decode_q8_0(data: Bytes) -> tuple[Bytes, Scales]:
    return data[..., 2:] ^ _SIGN, _d_of(data[..., :2])


_ALL_BITS = np.uint8(255)


def _encode_q2_0(words: Bytes, scale: Scales) -> Bytes:
    return np.concatenate([_d_bytes(-scale), words ^ _ALL_BITS], axis=-1)


def _decode_q2_0(data: Bytes) -> tuple[Bytes, Scales]:
    return data[..., 2:] ^ _ALL_BITS, -_d_of(data[..., :2])


def _products(d: Scales, small: Any) -> Scales:
    """Scales of tiles; as in `numerics.scales.stored`, a zero is positive."""
    product = d.astype(np.float32) * small.astype(np.float32)
    return np.where(product == 0, np.float32(0), product)


def _encode_q6_k(words: Bytes, scale: Scales) -> Bytes:
    index = np.argmax(np.abs(scale), axis=-1, keepdims=True)
    exact = np.take_along_axis(scale, index, axis=-1) / np.float32(-128)
    # What overflows or is not finite here is refused below.
    with np.errstate(over="ignore", invalid="ignore"):
        small = np.rint(scale / np.where(exact == 0, np.float32(1), exact)).astype(np.int8)
        d = exact.astype(np.float16)
        same = _products(d, small).view(np.uint32) == np.ascontiguousarray(scale).view(np.uint32)
    if not same.all():
        wrong = np.count_nonzero(~same)
        raise ValueError(f"{wrong} of {same.size} scales are no float16 times an int8 of q6_k")
    return np.concatenate([words, small.view(np.uint8), _d_bytes(d)], axis=-1)


def _decode_q6_k(data: Bytes) -> tuple[Bytes, Scales]:
    small = np.ascontiguousarray(data[..., 192:208]).view(np.int8)
    return data[..., :192], _products(_d_of(data[..., 208:]), small)


_TABLE = (
    Blocks(
        name="Q4_0", grid=Grid(format="q4_0"), elements=32, size=18,
        encode=_encode_q4_0, decode=_decode_q4_0,
    ),
    Blocks(
        name="Q8_0", grid=Grid(format="q8_0"), elements=32, size=34,
        encode=_encode_q8_0, decode=_decode_q8_0,
    ),
    Blocks(
        name="Q2_0", grid=Grid(format="int2", tile=64, scale_dtype="float16"), elements=64, size=18,
        encode=_encode_q2_0, decode=_decode_q2_0,
    ),
    Blocks(
        name="Q6_K", grid=Grid(format="q6_k"), elements=256, size=210,
        encode=_encode_q6_k, decode=_decode_q6_k,
    ),
)  # fmt: skip

BLOCKS: dict[Grid, Blocks] = {blocks.grid: blocks for blocks in _TABLE}
"""What is written of a quantized parameter, by its grid; other grids have no form."""

BLOCKS_NAMED: dict[str, Blocks] = {blocks.name: blocks for blocks in _TABLE}
"""The same by ggml's name of the type."""


def to_blocks(arrays: Sequence[QArray], tensor: Tensor) -> UInt8[np.ndarray, "..."]:
    """Returns the blocks of quantized parameters, which share one grid.

    Shapes: result [..., out, in / elements * size], sizes as in the table of blocks.
    Raises: InputError naming a parameter whose scales are no products of a float16 and an int8,
        though its grid says so.
    Exactness: codes and scales bit for bit; nothing is rounded.
    """
    rows = _rows(tensor)
    parts = []
    for q, parameter in zip(arrays, tensor.parameters, strict=True):
        kind = BLOCKS[q.grid]
        packed = _pack(dataclasses.replace(q, codes=on_host(q.codes), scale=on_host(q.scale)))
        words, scale = np.asarray(packed.words), np.asarray(packed.scale)
        count = _length(parameter) // kind.elements
        split = [x.reshape(*x.shape[:-1], count, x.shape[-1] // count) for x in (words, scale)]
        try:
            parts.append(kind.encode(*split).reshape(*rows, -1))
        except ValueError as error:
            raise InputError(f"{parameter.path}: {error}") from None
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-2)


def from_blocks(data: UInt8[np.ndarray, "..."], tensor: Tensor, kind: Blocks) -> list[QArray]:
    """Returns the codes and scales in blocks, one `QArray` per parameter, in host memory.

    Shapes: data [..., out, in / elements * size].
    Raises: ValueError when blocks do not divide a parameter's reduced axes.
    """
    return [one_from_blocks(data, tensor, kind, i) for i in range(len(tensor.parameters))]


def one_from_blocks(
    data: UInt8[np.ndarray, "..."], tensor: Tensor, kind: Blocks, index: int
) -> QArray:
    """Returns what `from_blocks` gives for parameter `index` of the tensor, reading no other's blocks.

    Where a batch axis leads (experts, rows of a table) it is decoded in pieces, so that memory stays near that of the
    result.
    """
    parameter, rows = tensor.parameters[index], data.shape[-2] // len(tensor.parameters)
    data = data[..., index * rows : (index + 1) * rows, :]
    lead, length, _ = split_axes(parameter.shape, parameter.reduced)
    kind.grid.tiles(length, parameter.path)
    if not lead or parameter.size <= _PIECE:
        return _decoded(data, parameter, parameter.shape, kind)
    step = max(1, _PIECE * lead[0] // parameter.size)
    codes = np.empty(parameter.shape, np.int8)
    scale = np.empty(
        scale_shape(parameter.shape, parameter.reduced, kind.grid), kind.grid.scale_dtype
    )
    for at in range(0, lead[0], step):
        part = data[at : at + step]
        q = _decoded(part, parameter, (len(part), *parameter.shape[1:]), kind)
        codes[at : at + step], scale[at : at + step] = q.codes, q.scale
    # Left as numpy's: what is this large would be copied on its way into a jax array.
    return QArray(codes=codes, scale=scale, grid=kind.grid, reduced=parameter.reduced)


_PIECE = 2**25
"""Elements that are decoded at once; decoding takes some ten bytes for each."""


def _decoded(data: Bytes, parameter: Parameter, shape: tuple[int, ...], kind: Blocks) -> QArray:
    lead, length, trail = split_axes(shape, parameter.reduced)
    blocks = data.reshape(*lead, *trail, length // kind.elements, kind.size)
    words, scale = (x.reshape(*lead, *trail, -1) for x in kind.decode(blocks))
    packed = PackedArray(
        words=on_host(words),
        scale=on_host(scale),
        grid=kind.grid,
        shape=shape,
        reduced=parameter.reduced,
    )
    return _unpack(packed)


def _length(parameter: Parameter) -> int:
    return split_axes(parameter.shape, parameter.reduced)[1]


def _rows(tensor: Tensor) -> tuple[int, ...]:
    *outer, out, _ = tensor.shape
    return (*outer, out // len(tensor.parameters))


def on_host(x: Any) -> jax.Array:
    """Returns an array in host memory, whatever accelerator there is."""
    # Moving bits needs no accelerator, and what it packs may not fit beside what is there.
    return jax.device_put(np.asarray(x), jax.devices("cpu")[0])


_pack = jax.jit(pack)
_unpack = jax.jit(PackedArray.unpack)
