"""The header of a GGUF file: key/values and where tensors stand, believed only as far as the file goes.

    "GGUF" | version u32 | tensors u64 | key/values u64
    key/value: name | type u32 | value           string: length u64, bytes      array: type u32, count u64, elements
    tensor:    name | rank u32 | dimensions u64 ... (innermost first) | type u32 | offset u64
    padding to `general.alignment`, then the tensors at their offsets

Every number in a header may be wrong or hostile. A count is compared with the bytes that are left before anything is
made of it, and a header ends at 128 MiB (Gemma's, vocabulary included, has some 16): reading one costs a small multiple
of its own bytes whatever it claims. A tensor must lie inside the file and share no byte with another. Names are looked
up, never used as paths, and shown quoted and cut short.

Source: the GGUF specification (docs/gguf.md in ggml-org/ggml), versions 2 and 3.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gemma_qat.errors import InputError

MOST_ELEMENTS = 2**22
"""Of an array in a header; Gemma's vocabulary has 262,144 pieces and half a million merges."""
_MOST_ENTRIES = 2**16
_LARGEST = 2**27
_LONGEST_NAME = 2**10
_LONGEST_TEXT = 2**20
_LARGEST_ALIGNMENT = 2**16

TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17), 42: ("Q2_0", 64, 18),
}  # fmt: skip
"""By ggml's number of a type: name, elements of a block, bytes of a block."""

_SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
_TEXT, _ARRAY = 8, 9


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Where a tensor stands in its file.

    Shapes: `shape` is [..., out, in], the file's dimensions backwards.
    """

    name: str
    kind: str
    """ggml's name of the type."""
    shape: tuple[int, ...]
    start: int
    """In bytes, from the beginning of the file."""
    bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Header:
    """What a GGUF file says of itself."""

    keys: dict[str, Any]
    tensors: dict[str, TensorInfo]


def read_header(path: Path) -> Header:
    """Returns the header of a GGUF file; no tensor is read.

    Raises: FileNotFoundError; InputError in one line for anything that is not a header, or that the file is too short
        for.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with path.open("rb") as file:
        try:
            return _header(_Bytes(file, path.stat().st_size))
        except InputError as error:
            raise InputError(f"{path}: not a readable GGUF file ({error})") from None


class _Bytes:
    """The bytes of a file in order, counted."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self.size, self.at = file, size, 0

    def take(self, count: int, what: str) -> bytes:
        if count > self.size - self.at:
            raise InputError(
                f"{what}: {count} bytes at {self.at} expected, the file ends at {self.size}"
            )
        if self.at + count > _LARGEST:
            raise InputError(f"{what}: a header of more than {_LARGEST} bytes")
        found = self._file.read(count)
        if len(found) != count:
            raise InputError(f"{what}: the file ends at {self.at + len(found)}")
        self.at += count
        return found

    def number(self, kind: str, what: str) -> Any:
        return np.frombuffer(self.take(np.dtype(kind).itemsize, what), kind)[0].item()

    def text(self, longest: int, what: str) -> str:
        (length,) = struct.unpack("<Q", self.take(8, what))
        if length > longest:
            raise InputError(f"{what}: a text of {length} bytes, at most {longest} expected")
        try:
            return self.take(length, what).decode()
        except UnicodeDecodeError:
            raise InputError(f"{what}: a text that is not UTF-8") from None

    def count(self, most: int, smallest: int, what: str, kind: str = "<u8") -> int:
        """Returns a number of things that take at least `smallest` bytes each."""
        found = self.number(kind, what)
        if found > min(most, (self.size - self.at) // smallest):
            raise InputError(
                f"{what}: {found} of them, more than {most} or than the file has bytes for"
            )
        return found


def _header(data: _Bytes) -> Header:
    if data.take(4, "magic") != b"GGUF":
        raise InputError("it does not begin with GGUF")
    version = data.number("<u4", "version")
    if version not in (2, 3):
        hint = " (a big-endian file?)" if version in (2 << 24, 3 << 24) else ""
        raise InputError(f"version {version} given, 2 or 3 expected{hint}")
    tensors = data.count(_MOST_ENTRIES, 24, "tensors")
    entries = data.count(_MOST_ENTRIES, 13, "key/values")
    keys: dict[str, Any] = {}
    for _ in range(entries):
        name = _name(data, keys, "key")
        keys[name] = _value(data, data.number("<u4", name), f"key {quoted(name)}")
    found: dict[str, TensorInfo] = {}
    for _ in range(tensors):
        name = _name(data, found, "tensor")
        found[name] = _tensor(data, name)
    alignment = keys.get("general.alignment", 32)
    if (
        type(alignment) is not int
        or not 0 < alignment <= _LARGEST_ALIGNMENT
        or alignment & (alignment - 1)
    ):
        raise InputError(f"alignment {quoted(str(alignment))} given, a power of two expected")
    start = -(-data.at // alignment) * alignment
    placed = {n: dataclasses.replace(t, start=t.start + start) for n, t in found.items()}
    _refuse_places(placed, alignment, start, data.size)
    return Header(keys=keys, tensors=placed)


def _name(data: _Bytes, known: dict[str, Any], what: str) -> str:
    name = data.text(_LONGEST_NAME, f"name of a {what}")
    if not name or not name.isprintable():
        raise InputError(f"{what} {quoted(name)}: a name of printable characters expected")
    if name in known:
        raise InputError(f"{what} {quoted(name)}: there twice")
    return name


def _value(data: _Bytes, kind: int, what: str) -> Any:
    if kind == _TEXT:
        return data.text(_LONGEST_TEXT, what)
    if kind in _SCALARS:
        return data.number(_SCALARS[kind], what)
    if kind != _ARRAY:
        raise InputError(f"{what}: values of type {kind}, at most 12 expected")
    inside = data.number("<u4", what)
    if inside == _TEXT:
        count = data.count(MOST_ELEMENTS, 8, what)
        return [data.text(_LONGEST_TEXT, what) for _ in range(count)]
    if inside not in _SCALARS:
        raise InputError(f"{what}: an array of values of type {inside}, numbers or texts expected")
    size = np.dtype(_SCALARS[inside]).itemsize
    count = data.count(MOST_ELEMENTS, size, what)
    return np.frombuffer(data.take(count * size, what), _SCALARS[inside]).tolist()


def _tensor(data: _Bytes, name: str) -> TensorInfo:
    what = f"tensor {quoted(name)}"
    rank = data.count(4, 8, f"{what}: dimensions", "<u4")
    shape = tuple(data.number("<u8", what) for _ in range(rank))[::-1]
    number, start = data.number("<u4", what), data.number("<u8", what)
    if number not in TYPES:
        raise InputError(f"{what}: type {number}, which is not known here")
    kind, elements, size = TYPES[number]
    if not shape or min(shape) < 1 or shape[-1] % elements:
        raise InputError(
            f"{what}: shape {shape} of {kind}, rows of whole blocks of {elements} expected"
        )
    total = math.prod(shape) // elements * size
    return TensorInfo(name=name, kind=kind, shape=shape, start=start, bytes=total)


def _refuse_places(tensors: dict[str, TensorInfo], alignment: int, start: int, size: int) -> None:
    end, before = start, ""
    for tensor in sorted(tensors.values(), key=lambda t: (t.start, t.bytes)):
        what = f"tensor {quoted(tensor.name)}"
        if tensor.start % alignment:
            raise InputError(
                f"{what}: begins at {tensor.start}, a multiple of {alignment} expected"
            )
        if tensor.start < end:
            raise InputError(f"{what}: shares bytes with {quoted(before)}")
        end, before = tensor.start + tensor.bytes, tensor.name
        if end > size:
            raise InputError(f"{what}: ends at byte {end}, the file at {size}")


def quoted(text: str) -> str:
    """Returns a text from a file as a quoted line of at most 60 characters."""
    shown = ascii(text[:61])
    return shown if len(shown) <= 62 else f"{shown[:58]}...'"
