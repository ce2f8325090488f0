"""An export beside the checkpoint it was made from: what differs, what it weighs, and the model that it is."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gemma_qat.checkpoint.huggingface import read_parameters
from gemma_qat.checkpoint.source import Source
from gemma_qat.errors import unknown
from gemma_qat.export.artifact import Artifact
from gemma_qat.export.check import compare
from gemma_qat.export.compressed_read import open_compressed_tensors
from gemma_qat.export.compressed_tensors import as_written
from gemma_qat.export.gguf_grids import on_blocks
from gemma_qat.export.gguf_read import read_gguf
from gemma_qat.export.hub import Reading
from gemma_qat.export.huggingface import requantized, value_of
from gemma_qat.export.mobile import with_all_scales
from gemma_qat.export.mobile_read import open_mobile
from gemma_qat.export.source import artifact_of
from gemma_qat.models import (
    Fitted,
    Gemma4,
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

    Raises: FileNotFoundError; InputError for an unknown format, or a file that is not readable.
    """
    if format not in _READERS:
        raise unknown("export format", format, _READERS)
    with _READERS[format](artifact, path) as found:
        yield found


def figures(artifact: Artifact, format: str, path: Path) -> dict[str, int | float]:
    """Returns what `compare` counts of an export, with its bytes and bits per weight.

    Keys: differing_codes, differing_scales, differing_floats, tensors, bytes, bits_per_weight; for float files of
    quantized models also `codes` and `changed`, as `requantized` has them.
    Units: bytes are of everything at `path`; a weight is a parameter of the model.
    Raises: as `reread` and `compare` do.
    """
    with reread(artifact, format, path) as (written, arrays):
        found: dict[str, int | float] = {**compare(written, arrays)}
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    found |= {"bytes": size, "bits_per_weight": 8 * size / parameter_count(artifact.config)}
    if format == "huggingface" and artifact.plans:
        found |= requantized(artifact)
    return found


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


Opened = Iterator[tuple[Artifact, Arrays]]


@contextlib.contextmanager
def _gguf(artifact: Artifact, path: Path) -> Opened:
    yield on_blocks(artifact), read_gguf(path)


@contextlib.contextmanager
def _native(artifact: Artifact, path: Path) -> Opened:
    again = artifact_of(path)
    yield artifact, {**again.quantized, **again.floats}


@contextlib.contextmanager
def _huggingface(artifact: Artifact, path: Path) -> Opened:
    yield in_float(artifact), read_parameters(path)[1]


def _hub(
    opened: Callable[[Path], contextlib.AbstractContextManager[Source]],
    written: Callable[[Artifact, Source], Artifact],
) -> Callable[[Artifact, Path], contextlib.AbstractContextManager[tuple[Artifact, Arrays]]]:
    @contextlib.contextmanager
    def reader(artifact: Artifact, path: Path) -> Opened:
        with opened(path) as source:
            yield written(artifact, source), Reading(source)

    return reader


def _compressed(artifact: Artifact, source: Source) -> Artifact:
    tables = ("embed/table", "per_layer/embed/table")
    return as_written(artifact, packed_tables=any(path in source.plans for path in tables))


_READERS: dict[str, Any] = {
    "gguf": _gguf,
    "native": _native,
    "huggingface": _huggingface,
    "compressed-tensors": _hub(open_compressed_tensors, _compressed),
    "mobile": _hub(open_mobile, lambda artifact, source: with_all_scales(artifact)),
}
