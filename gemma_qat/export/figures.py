"""An export beside the checkpoint it was made from: what differs, what it weighs, and the model that it is."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gemma_qat.checkpoint.huggingface import TensorFiles, read_parameters
from gemma_qat.checkpoint.maps import TOWERS
from gemma_qat.checkpoint.source import Reading, Source
from gemma_qat.errors import InputError, unknown
from gemma_qat.export.artifact import Artifact
from gemma_qat.export.check import compare
from gemma_qat.export.compressed_read import open_compressed_tensors
from gemma_qat.export.compressed_tensors import as_written
from gemma_qat.export.gguf_grids import on_blocks
from gemma_qat.export.gguf_read import open_gguf
from gemma_qat.export.hub import MARKER
from gemma_qat.export.huggingface import requantized, value_of
from gemma_qat.export.litert import as_written as as_litert
from gemma_qat.export.litert import open_litert
from gemma_qat.export.mobile import with_all_scales
from gemma_qat.export.mobile_read import open_mobile
from gemma_qat.export.source import artifact_of
from gemma_qat.models import (
    Fitted,
    Gemma4,
    ModelConfig,
    RunOptions,
    packed_model,
    parameter_count,
    static_scale_paths,
)
from gemma_qat.numerics import QArray

Arrays = Mapping[str, QArray | np.ndarray]


@contextlib.contextmanager
def reread(artifact: Artifact, format: str, path: Path) -> Iterator[tuple[Artifact, Arrays]]:
    """Opens an export: (the artifact as its format says it, the arrays that stand in the file).

    Raises: FileNotFoundError; InputError for an unknown format, a file that is not readable, or one of another model.
    """
    if format not in _READERS:
        raise unknown("export format", format, _READERS)
    with _READERS[format](artifact, path) as (written, arrays, config):
        _refuse_another_model(written.config, config, path)
        yield written, arrays


def _refuse_another_model(mine: ModelConfig, found: ModelConfig, path: Path) -> None:
    for field in dataclasses.fields(ModelConfig):
        name = field.name
        here, there = getattr(mine, name), getattr(found, name)
        if name == "name" or here == there:
            continue
        if name == "shared_ffn_width" and {here, there} <= {0, mine.ffn_width}:
            continue  # a width of their own that is everybody's
        raise InputError(
            f"{path}: another model than the checkpoint's: {name} is {there}, {here} expected"
        )


def figures(artifact: Artifact, format: str, path: Path) -> dict[str, int | float]:
    """Returns what `compare` counts of an export, with its bytes and bits per weight.

    Keys: differing_codes, differing_scales, differing_floats, tensors, changed_files (of a hub directory, since it was
    written), bytes, bits_per_weight; for float files of quantized models also `codes` and `changed`, as `requantized`
    has them.
    Units: bytes are of the model's arrays (of a GGUF or a native checkpoint with all beside them); a weight is a
        parameter of the model.
    Raises: as `reread` and `compare` do.
    """
    with reread(artifact, format, path) as (written, arrays):
        try:
            found: dict[str, int | float] = {**compare(written, arrays)}
        except ValueError as error:
            raise InputError(f"{path}: not an export of this checkpoint ({error})") from None
    found["changed_files"] = len(_changed_files(path))
    size = _bytes_of(path)
    found |= {"bytes": size, "bits_per_weight": 8 * size / parameter_count(artifact.config)}
    if format == "huggingface" and artifact.plans:
        found |= requantized(artifact, _noted(path).get("dtype", "float32"))
    return found


def _bytes_of(path: Path) -> int:
    """Bytes of the model's arrays: of a hub directory its tensors but for towers, else of all files."""
    if not any(path.glob("*.safetensors")):
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        return sum(file.stat().st_size for file in files)
    with TensorFiles(path) as tensors:
        own = (name for name in tensors.names if not name.startswith(tuple(TOWERS)))
        return sum(tensors.raw(name).bytes for name in own)


def _noted(path: Path) -> dict[str, Any]:
    """What a hub directory of ours says of itself; nothing of another."""
    marker = path / MARKER
    return json.loads(marker.read_text("utf-8")) if marker.is_file() else {}


def _changed_files(path: Path) -> list[str]:
    """Files of a hub directory whose digest is not the one that was noted when it was written."""
    noted = _noted(path).get("sha256", {})
    return [name for name, digest in noted.items() if _sha256(path / name) != digest]


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def model_of(
    artifact: Artifact, format: str, path: Path, options: RunOptions = RunOptions()
) -> Gemma4:
    """Returns the model whose arrays stand in an export, with the artifact's roundings of activations.

    Float files have none of those: their model is a float one.
    """
    with reread(artifact, format, path) as (written, arrays):
        read = {name: _float32(arrays[name]) for name in arrays}
    if not written.plans:
        return Gemma4.from_parameters(written.config, read, None, options)
    fitted = Fitted(config=written.config, recipe=written.recipe, plans=written.plans)
    codes = {name: array for name, array in read.items() if isinstance(array, QArray)}
    floats = {name: array for name, array in read.items() if name not in codes}
    return packed_model(codes, floats, fitted, options)


def _float32(array: QArray | np.ndarray) -> QArray | np.ndarray:
    return array if isinstance(array, QArray) else np.asarray(array, np.float32)


def in_float(artifact: Artifact) -> Artifact:
    """Returns the artifact as float files have it: the values of its codes, nothing rounded on the way."""
    statics = set(static_scale_paths(artifact.plans))
    paths = [path for path in artifact.floats if path not in statics]
    values = {path: value_of(artifact, path) for path in [*artifact.quantized, *paths]}
    return dataclasses.replace(artifact, recipe="float", plans={}, quantized={}, floats=values)


Opened = Iterator[tuple[Artifact, Arrays, ModelConfig]]


@contextlib.contextmanager
def _gguf(artifact: Artifact, path: Path) -> Opened:
    with open_gguf(path) as source:
        yield on_blocks(artifact), Reading(source), source.config


@contextlib.contextmanager
def _native(artifact: Artifact, path: Path) -> Opened:
    again = artifact_of(path)
    yield artifact, {**again.quantized, **again.floats}, again.config


@contextlib.contextmanager
def _huggingface(artifact: Artifact, path: Path) -> Opened:
    config, arrays = read_parameters(path)
    yield in_float(artifact), arrays, config


def _hub(
    opened: Callable[[Path], contextlib.AbstractContextManager[Source]],
    written: Callable[[Artifact, Source], Artifact],
) -> Callable[
    [Artifact, Path], contextlib.AbstractContextManager[tuple[Artifact, Arrays, ModelConfig]]
]:
    @contextlib.contextmanager
    def reader(artifact: Artifact, path: Path) -> Opened:
        with opened(path) as source:
            yield written(artifact, source), Reading(source), source.config

    return reader


def _compressed(artifact: Artifact, source: Source) -> Artifact:
    tables = ("embed/table", "per_layer/embed/table")
    return as_written(artifact, packed_tables=any(path in source.plans for path in tables))


_READERS: dict[str, Any] = {
    "gguf": _gguf,
    "native": _native,
    "huggingface": _huggingface,
    "compressed-tensors": _hub(open_compressed_tensors, _compressed),
    "litert": _hub(open_litert, lambda artifact, source: as_litert(artifact)),
    "mobile": _hub(open_mobile, lambda artifact, source: with_all_scales(artifact)),
}
