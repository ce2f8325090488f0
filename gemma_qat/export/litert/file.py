"""The file: the graph in front, the bytes of all weights behind it, each written when its turn comes.

A buffer whose bytes are not in the flatbuffer says where in the file they are. Those numbers are fields of a fixed
size, so the flatbuffer is packed twice: with others in their place, to learn how long it is, and with them.

Source: `Buffer.offset` and `Buffer.size` in google-ai-edge/LiteRT `schema.fbs`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from gemma_qat.export.litert.quantize import Whole
from gemma_qat.export.litert.stored import Stored

ALIGNMENT = 64
"""Of weights in the file, bytes; kernels read them where they lie in a mapped file."""


def place(whole: Whole, sites: Mapping[str, Stored]) -> int:
    """Gives every weight its place behind the flatbuffer and returns the bytes of the file."""
    for number in whole.weights:  # any number but 0 and 1, which mean "in the flatbuffer"
        buffer = whole.model.buffers[number]
        buffer.offset = buffer.size = 2
    at = _aligned(len(whole.packed()))
    for number, name in whole.weights.items():
        buffer = whole.model.buffers[number]
        buffer.offset, buffer.size = at, sites[name].nbytes
        at = _aligned(at + buffer.size)
    return at


def write(
    path: Path,
    whole: Whole,
    sites: Mapping[str, Stored],
    progress: Callable[[int, int], object] | None = None,
) -> int:
    """Writes a model with its weights and returns the bytes of the file; holds one weight at a time.

    `progress` is told (bytes written, bytes in all).
    """
    size = place(whole, sites)
    with path.open("wb") as file:
        file.write(whole.packed())
        for number, name in whole.weights.items():
            file.write(b"\0" * (whole.model.buffers[number].offset - file.tell()))
            data = sites[name].data()
            if data.nbytes != sites[name].nbytes:
                raise ValueError(f"{name}: {data.nbytes} bytes made, {sites[name].nbytes} expected")
            file.write(data.data)
            if progress is not None:
                progress(file.tell(), size)
        file.write(b"\0" * (size - file.tell()))
    return size


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
