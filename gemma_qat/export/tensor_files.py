"""Safetensors files written one tensor at a time, so that memory stays near the largest of them.

    8 bytes   length of the header, little endian
    header    JSON: {name: {dtype, shape, data_offsets}}, padded with spaces to 8 bytes
    data      the tensors one after another, little endian, rows first

Above a size the tensors go to several files, `model-00001-of-00003.safetensors` and so on, with the index that
Hugging Face reads. The header says where every tensor will stand before the first one is made, which is why shapes and
dtypes are given apart from the data. The files are read back with the `safetensors` package.

Source: the format's own description in huggingface/safetensors.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
}
"""The format's names of what is written here."""

SHARD_BYTES = 5_000_000_000
"""Bytes of tensors in one file, as on the hub; a larger tensor has a file for itself."""


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
        size = DTYPES[self.dtype].itemsize
        for length in self.shape:
            size *= length
        return size


def write_tensors(
    directory: Path,
    tensors: Sequence[Tensor],
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], object] | None = None,
) -> dict[str, str]:
    """Writes tensors into `directory` and returns the SHA-256 of every file by its name, the index left out.

    `progress` is told (bytes written, bytes in all).
    Raises: ValueError when two tensors have one name, or one is not what was announced.
    """
    names = [tensor.name for tensor in tensors]
    if len(set(names)) < len(names):
        raise ValueError(f"two tensors are called {max(names, key=names.count)}")
    files = _files(tensors, shard_bytes)
    written, total = 0, sum(tensor.bytes for tensor in tensors)
    digests = {}
    for name, inside in files.items():
        digests[name] = _write(directory / name, inside)
        written += sum(tensor.bytes for tensor in inside)
        if progress is not None:
            progress(written, total)
    if len(files) > 1:
        _write_index(directory, files, total)
    return digests


def _files(tensors: Sequence[Tensor], shard_bytes: int) -> dict[str, list[Tensor]]:
    shards: list[list[Tensor]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.bytes for t in shards[-1]) + tensor.bytes > shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    count = len(shards)
    return {f"model-{i:05}-of-{count:05}.safetensors": s for i, s in enumerate(shards, start=1)}


def _write_index(directory: Path, files: dict[str, list[Tensor]], total: int) -> None:
    places = {tensor.name: name for name, inside in files.items() for tensor in inside}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    text = json.dumps(index, indent=1) + "\n"
    (directory / "model.safetensors.index.json").write_text(text, "utf-8")


def _write(path: Path, tensors: Sequence[Tensor]) -> str:
    """Writes one file and returns its digest."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        _put(file, digest, _header(tensors))
        for tensor in tensors:
            _put(file, digest, _data(tensor))
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _put(file: BinaryIO, digest: Any, data: bytes | memoryview) -> None:
    file.write(data)
    digest.update(data)


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
    if array.shape != tensor.shape or array.dtype != DTYPES[tensor.dtype]:
        raise ValueError(
            f"{tensor.name}: {array.dtype} {array.shape} made, {tensor.dtype} {tensor.shape} announced"
        )
    # Through bytes: memoryview has no name for bfloat16.
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
