"""Tensors as a hub directory has them: one safetensors file, or shards with the index that Hugging Face reads.

Above a size the tensors go to several files, `model-00001-of-00003.safetensors` and so on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from gemma_qat.checkpoint.huggingface import INDEX, SINGLE
from gemma_qat.checkpoint.safetensors_file import Tensor, write_file

SHARD_BYTES = 5_000_000_000
"""Bytes of tensors in one file, as on the hub; a larger tensor has a file for itself."""


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
        digests[name] = write_file(directory / name, inside)
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
        return {SINGLE: shards[0]}
    count = len(shards)
    return {f"model-{i:05}-of-{count:05}.safetensors": s for i, s in enumerate(shards, start=1)}


def _write_index(directory: Path, files: dict[str, list[Tensor]], total: int) -> None:
    places = {tensor.name: name for name, inside in files.items() for tensor in inside}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    text = json.dumps(index, indent=1) + "\n"
    (directory / INDEX).write_text(text, "utf-8")
