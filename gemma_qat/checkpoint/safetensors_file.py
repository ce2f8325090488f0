"""One safetensors file: a header that is checked, and tensors read or written one at a time.

    8 bytes   length of the header, little endian
    header    JSON: {name: {dtype, shape, data_offsets}}, padded with spaces to 8 bytes
    data      the tensors one after another, little endian, rows first

The library is the judge of the header. Its readers map the file, and pages of a map that were touched count as this
process's memory until it is closed: a table of several GB would stand there twice. So bytes are read by offset.

Source: the format's own description in huggingface/safetensors.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from gemma_qat.checkpoint.source import Leaf
from gemma_qat.errors import InputError

DTYPES: dict[str, Any] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
"""The format's names of number types."""

_LONGEST_HEADER = 100_000_000
"""Bytes; the library's own bound."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """A tensor in a file: its type, shape, and where its bytes are."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    bytes: int

    @property
    def numpy(self) -> np.dtype:
        """The number type.

        Raises: InputError for one this program does not know.
        """
        if self.dtype not in DTYPES:
            raise InputError(f"number type {self.dtype}: one of {', '.join(DTYPES)} expected")
        return np.dtype(DTYPES[self.dtype])


def read_header(path: Path) -> dict[str, Entry]:
    """Returns the tensors of a file by name; reads nothing but the header.

    Raises: InputError naming the file when it is truncated, its header is absurd or its offsets do not fit.
    """
    from safetensors import SafetensorError, safe_open

    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _LONGEST_HEADER):
                raise InputError(
                    f"{path}: not a readable safetensors file (a header of {length:,} bytes in a file of {size:,})"
                )
            with safe_open(path, framework="numpy"):
                pass
            raw = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not a readable safetensors file ({error})") from None
    start = 8 + length
    raw.pop("__metadata__", None)
    return {name: _entry(found, start) for name, found in raw.items()}


def _entry(raw: dict[str, Any], start: int) -> Entry:
    first, end = raw["data_offsets"]
    return Entry(
        dtype=raw["dtype"], shape=tuple(raw["shape"]), offset=start + first, bytes=end - first
    )


def read_tensor(file: BinaryIO, entry: Entry, where: str) -> np.ndarray:
    """Returns the tensor at `entry` of an open file.

    Raises: InputError naming `where` when the file has become shorter.
    """
    file.seek(entry.offset)
    data = np.fromfile(file, np.uint8, entry.bytes)
    if data.size != entry.bytes:
        raise InputError(f"{where}: {entry.bytes} bytes expected, {data.size} there")
    return data.view(entry.numpy).reshape(entry.shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
    """A tensor to be written, made when its turn comes."""

    name: str
    dtype: str
    """One of `DTYPES`."""
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]

    @property
    def bytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * np.dtype(DTYPES[self.dtype]).itemsize


def of_leaf(leaf: Leaf) -> Tensor:
    """Returns an array as a tensor under its path."""
    names = {np.dtype(numpy).name: name for name, numpy in DTYPES.items()}

    def make() -> np.ndarray:
        return np.asarray(leaf.read())

    return Tensor(name=leaf.path, dtype=names[leaf.dtype], shape=leaf.shape, make=make)


def write_file(path: Path, tensors: Sequence[Tensor]) -> str:
    """Writes a file, a tensor in memory at a time, and returns its SHA-256.

    The header says where every tensor will stand before the first one is made, which is why shapes and dtypes are given
    apart from the data.
    Raises: ValueError when a tensor is not what was announced.
    """
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for data in _pieces(tensors):
            file.write(data)
            digest.update(data)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _pieces(tensors: Sequence[Tensor]) -> Iterator[bytes | memoryview]:
    yield _header(tensors)
    yield from map(_data, tensors)


def _header(tensors: Sequence[Tensor]) -> bytes:
    # transformers asks for the library the tensors are meant for.
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in tensors:
        end = start + tensor.bytes
        entries[tensor.name] = {
            "dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [start, end]
        }  # fmt: skip
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _data(tensor: Tensor) -> memoryview:
    array = np.asarray(tensor.make())
    if array.shape != tensor.shape or array.dtype != np.dtype(DTYPES[tensor.dtype]):
        raise ValueError(
            f"{tensor.name}: {array.dtype} {array.shape} made, {tensor.dtype} {tensor.shape} announced"
        )
    # Through bytes: memoryview has no name for bfloat16.
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
