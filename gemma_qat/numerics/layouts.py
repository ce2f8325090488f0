"""Where the bits of a code sit: the table of layouts.

A layout turns codes [..., n] (unsigned, 0 .. 2^bits - 1) into bytes [..., ceil(n * bits / 8)] and back, along the last
axis.

`little`: the first code in the lowest bits. Read as a little-endian bit stream it is the layout of compressed-tensors'
int32 words and of the byte streams in the mobile Gemma 4 checkpoints.

    4 bit:  byte j = | code 2j+1 | code 2j |          2 bit:  byte j = | 4j+3 | 4j+2 | 4j+1 | 4j |

`ggml_nibbles` (q4_0): within a block of 32, byte j holds code j low and code j + 16 high, so that one load and one mask
give 16 neighbouring elements.

    byte j = | code j+16 | code j |,  j = 0 .. 15

`ggml_q6_k` (q6_k): a block of 256 is two halves of 128 codes, each in four runs of 32. The low four bits of all of
them come first (`ql`, 128 bytes), then the high two (`qh`, 64 bytes). In each half, with c0 .. c3 the codes at place j
of the four runs, j = 0 .. 31:

    ql byte j = | c2 & 15 | c0 & 15 |,  ql byte j + 32 = | c3 & 15 | c1 & 15 |
    qh byte j = | c3 >> 4 | c2 >> 4 | c1 >> 4 | c0 >> 4 |

A length that does not fill the last byte (or block) is padded with code 0 and cut off again on unpacking.

Sources: compressed-tensors `pack_to_int32`; ggml-common.h `block_q4_0`, `block_q6_K`, and `dequantize_row_q6_K` of
ggml-quants.c in ggml-org/llama.cpp.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped, UInt8

from gemma_qat.errors import unknown

Codes = UInt8[Array, "..."]


def _padded(codes: Shaped[Array, "..."], multiple: int) -> Shaped[Array, "..."]:
    short = -codes.shape[-1] % multiple
    return jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, short)])


def _pack_little(codes: Codes, bits: int) -> Codes:
    per_byte = 8 // bits
    full = _padded(codes, per_byte)
    parts = full.reshape(*full.shape[:-1], full.shape[-1] // per_byte, per_byte)
    byte = jnp.zeros(parts.shape[:-1], jnp.uint8)
    for slot in range(per_byte):
        byte = byte | (parts[..., slot] << jnp.uint8(bits * slot))
    return byte


def _unpack_little(words: Codes, bits: int, length: int) -> Codes:
    per_byte = 8 // bits
    mask = jnp.uint8(2**bits - 1)
    slots = [(words >> jnp.uint8(bits * slot)) & mask for slot in range(per_byte)]
    codes = jnp.stack(slots, axis=-1)
    return codes.reshape(*words.shape[:-1], words.shape[-1] * per_byte)[..., :length]


def _pack_nibbles(codes: Codes, bits: int) -> Codes:
    full = _padded(codes, 32)
    halves = full.reshape(*full.shape[:-1], full.shape[-1] // 32, 2, 16)
    words = halves[..., 0, :] | (halves[..., 1, :] << jnp.uint8(bits))
    return words.reshape(*full.shape[:-1], full.shape[-1] // 2)


def _unpack_nibbles(words: Codes, bits: int, length: int) -> Codes:
    blocks = words.reshape(*words.shape[:-1], words.shape[-1] // 16, 1, 16)
    halves = jnp.concatenate([blocks & jnp.uint8(15), blocks >> jnp.uint8(bits)], axis=-2)
    return halves.reshape(*words.shape[:-1], words.shape[-1] * 2)[..., :length]


def _slots_little(x: Shaped[Array, "..."], bits: int) -> Shaped[Array, "P ..."]:
    per_byte = 8 // bits
    full = _padded(x, per_byte)
    parts = full.reshape(*full.shape[:-1], full.shape[-1] // per_byte, per_byte)
    return jnp.moveaxis(parts, -1, 0)


def _slots_nibbles(x: Shaped[Array, "..."], bits: int) -> Shaped[Array, "P ..."]:
    del bits
    full = _padded(x, 32)
    halves = full.reshape(*full.shape[:-1], full.shape[-1] // 32, 2, 16)
    return jnp.moveaxis(halves, -2, 0).reshape(2, *full.shape[:-1], full.shape[-1] // 2)


_LOW, _HIGH = np.uint8(15), np.uint8(3)


def _pack_q6_k(codes: Codes, bits: int) -> Codes:
    del bits
    full = _padded(codes, 256)
    lead, blocks = full.shape[:-1], full.shape[-1] // 256
    runs = full.reshape(*lead, blocks, 2, 4, 32)
    low, high = runs & _LOW, runs >> jnp.uint8(4)
    nibbles = low[..., :2, :] | (low[..., 2:, :] << jnp.uint8(4))
    pairs = high[..., 0, :]
    for run in range(1, 4):
        pairs = pairs | (high[..., run, :] << jnp.uint8(2 * run))
    parts = [nibbles.reshape(*lead, blocks, 128), pairs.reshape(*lead, blocks, 64)]
    return jnp.concatenate(parts, axis=-1).reshape(*lead, blocks * 192)


def _unpack_q6_k(words: Codes, bits: int, length: int) -> Codes:
    del bits
    lead, blocks = words.shape[:-1], words.shape[-1] // 192
    parts = words.reshape(*lead, blocks, 192)
    nibbles = parts[..., :128].reshape(*lead, blocks, 2, 2, 32)
    low = jnp.concatenate([nibbles & _LOW, nibbles >> jnp.uint8(4)], axis=-2)
    pairs = parts[..., 128:].reshape(*lead, blocks, 2, 32)
    high = jnp.stack([(pairs >> jnp.uint8(2 * run)) & _HIGH for run in range(4)], axis=-2)
    codes = low | (high << jnp.uint8(4))
    return codes.reshape(*lead, blocks * 256)[..., :length]


@dataclasses.dataclass(frozen=True)
class Layout:
    """A way to put codes into bytes along the last axis, and to take them out again."""

    name: str
    bits: tuple[int, ...]
    pack: Callable[[Codes, int], Codes]
    unpack: Callable[[Codes, int, int], Codes]
    """unpack(words, bits, length)."""
    slots: Callable[[Any, int], Any] | None = None
    """slots(x, bits): numbers [..., n] as [codes of a byte, ..., bytes], each where the code of its place sits; padded
    with zeros. What is multiplied with codes can be laid beside them so, and no code has to move. None where a code is
    spread over bytes."""
    codes: int = 0
    """Codes that are packed together; 0: as many as fill a byte."""

    def block(self, bits: int) -> int:
        """Returns how many codes of `bits` bits are packed together: cuts between such blocks leave whole bytes."""
        return self.codes or 8 // bits


LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout("little", (2, 4, 8), _pack_little, _unpack_little, _slots_little),
        Layout("ggml_nibbles", (4,), _pack_nibbles, _unpack_nibbles, _slots_nibbles, codes=32),
        Layout("ggml_q6_k", (6,), _pack_q6_k, _unpack_q6_k, codes=256),
    )
}


def layout_named(name: str, bits: int) -> Layout:
    """Returns the layout called `name`.

    Raises: InputError when there is none; ValueError when it does not hold codes of `bits` bits.
    """
    if name not in LAYOUTS:
        raise unknown("layout", name, LAYOUTS)
    layout = LAYOUTS[name]
    if bits not in layout.bits:
        raise ValueError(f"layout {name}: {bits} bits given, one of {layout.bits} expected")
    return layout
