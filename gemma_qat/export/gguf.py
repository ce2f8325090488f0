"""GGUF files of Gemma 4 for llama.cpp: ggml's codes and scales as they are, the rest in float.

| ours | in the file |
|---|---|
| sites on the grids q4_0, q8_0, q6_k | Q4_0, Q8_0, Q6_K: the same codes and scales |
| norms, scalars, the router | F32 |
| other float matrices | F32, or F16 when asked for |

Norm weights are stored as they multiply (nothing is added or taken away), heads are not permuted,
experts' gate and up rows stand in one tensor. Tensors are converted one at a time, so memory stays
near the largest of them.

Source: the GGUF specification (docs/gguf.md in ggml-org/ggml); gguf-py writes and reads the
container.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gemma_qat.errors import InputError, nearest, unknown
from gemma_qat.export.artifact import Artifact
from gemma_qat.export.files import appearing_file
from gemma_qat.export.gguf_blocks import BLOCKS, BLOCKS_NAMED, Blocks, from_blocks, to_blocks
from gemma_qat.export.gguf_keys import (
    ARCHITECTURE,
    config_keys,
    config_of,
    refuse_config,
    rope_factors,
)
from gemma_qat.export.gguf_map import (
    ROPE_FACTORS,
    Tensor,
    from_floats,
    tensors_of,
    to_floats,
)
from gemma_qat.export.gguf_vocab import KeyValues, vocabulary_keys
from gemma_qat.models.config import ModelConfig
from gemma_qat.numerics import Grid, QArray

_FLOATS: dict[str, Any] = {"f32": np.float32, "f16": np.float16}

# `llama_ftype`: what most of the file is; tensors say for themselves what they are.
_FILE_TYPE_Q4_0 = 2
_FILE_TYPE_FLOAT = {"f32": 0, "f16": 1}


def write_gguf(
    artifact: Artifact,
    out: Path,
    *,
    float_type: str = "f32",
    verify: Callable[[Path], object] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> dict[str, int]:
    """Writes a GGUF file and returns its size: {"bytes", "tensors"}.

    `float_type` (f32, f16) is that of float matrices; `verify` is called with the finished file before it
    appears as `out`; `progress` with (tensors written, tensors in all).

    Raises: InputError, before any file appears, for what GGUF cannot carry: a grid that is not
        among ggml's blocks, a layout that llama.cpp does not run, a tokenizer of another size.
    Exactness: codes and scales bit for bit; floats too, unless `float_type` rounds them.
    """
    keys = artifact_keys(artifact, float_type)
    tensors = tensors_of(artifact.config)
    _refuse(artifact, tensors, float_type)
    with appearing_file(out) as partial:
        _write(artifact, tensors, keys, partial, float_type, progress)
        if verify is not None:
            verify(partial)
        size = partial.stat().st_size
    return {"bytes": size, "tensors": len(tensors) + _has_factors(artifact.config)}


def artifact_keys(artifact: Artifact, float_type: str = "f32") -> KeyValues:
    """Returns every key/value the file of `artifact` holds.

    Raises: InputError when the tokenizer is not the model's, or for an unknown float type.
    """
    if float_type not in _FLOATS:
        raise unknown("float type", float_type, _FLOATS)
    file_type = _FILE_TYPE_Q4_0 if artifact.quantized else _FILE_TYPE_FLOAT[float_type]
    return {
        "general.architecture": ARCHITECTURE,
        "general.type": "model",
        "general.name": artifact.config.name,
        "general.file_type": file_type,
        "general.quantization_version": 2,
        **config_keys(artifact.config),
        **vocabulary_keys(artifact.tokenizer, artifact.config.vocab_size),
    }


def _refuse(artifact: Artifact, tensors: Mapping[str, Tensor], float_type: str) -> None:
    for path, q in artifact.quantized.items():
        if q.grid not in BLOCKS:
            written = ", ".join(grid.format for grid in BLOCKS)
            raise InputError(
                f"recipe {artifact.recipe} has no GGUF form yet: {path} is {_described(q.grid)}, "
                f"only {written} as ggml has them are written"
            )
    for path, plan in artifact.plans.items():
        if plan.activations:
            raise InputError(
                f"recipe {artifact.recipe} has no GGUF form: {path} rounds activations or its cache, GGUF keeps no "
                "scales for those"
            )
    refuse_config(artifact.config)
    for tensor in tensors.values():
        paths = [parameter.path for parameter in tensor.parameters]
        if len({_blocks_of(artifact, path) for path in paths}) > 1:
            raise InputError(
                f"{tensor.name}: holds {' and '.join(paths)}, all float or all on one grid expected"
            )
        if float_type == "f16" and tensor.is_matrix:
            _refuse_overflow(artifact, paths)


def _described(grid: Grid) -> str:
    return f"{grid.format} ({grid.scale_dtype} scales, divisor {grid.divisor:g})"


def _blocks_of(artifact: Artifact, path: str) -> Blocks | None:
    q = artifact.quantized.get(path)
    return None if q is None else BLOCKS[q.grid]


def _refuse_overflow(artifact: Artifact, paths: list[str]) -> None:
    limit = float(np.finfo(np.float16).max)
    for path in paths:
        top = float(np.max(np.abs(artifact.floats.get(path, 0.0))))
        if top > limit:
            raise InputError(
                f"{path}: {top:g} does not fit float16 (at most {limit:g}); use float type f32"
            )


def _write(
    artifact: Artifact,
    tensors: Mapping[str, Tensor],
    keys: KeyValues,
    path: Path,
    float_type: str,
    progress: Callable[[int, int], object] | None,
) -> None:
    gguf = _gguf()
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32}
    add |= {float: writer.add_float32, list: writer.add_array}
    for key, value in keys.items():
        if key != "general.architecture":  # the writer has put it there itself
            add[type(value)](key, value)
    if _has_factors(artifact.config):
        _declare(writer, ROPE_FACTORS, rope_factors(artifact.config).shape, np.float32)
    for tensor in tensors.values():
        blocks = _blocks_of(artifact, tensor.parameters[0].path)
        kind = blocks or _float_dtype(tensor, float_type)
        _declare(writer, tensor.name, tensor.shape, kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if _has_factors(artifact.config):
            writer.write_tensor_data(rope_factors(artifact.config))
        for done, tensor in enumerate(tensors.values(), start=1):
            writer.write_tensor_data(_data(artifact, tensor, float_type))
            if progress is not None:
                progress(done, len(tensors))
    finally:
        writer.close()


def _declare(writer: Any, name: str, shape: tuple[int, ...], kind: Any) -> None:
    """Announces a tensor, of blocks or of a float dtype."""
    if isinstance(kind, Blocks):
        found = _gguf().GGMLQuantizationType[kind.name]
        stored = (*shape[:-1], shape[-1] // kind.elements * kind.size)
        size = int(np.prod(stored, dtype=np.int64))
        writer.add_tensor_info(name, stored, np.dtype(np.uint8), size, raw_dtype=found)
    else:
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(kind).itemsize
        writer.add_tensor_info(name, shape, np.dtype(kind), size)


def _data(artifact: Artifact, tensor: Tensor, float_type: str) -> np.ndarray:
    paths = [parameter.path for parameter in tensor.parameters]
    if paths[0] in artifact.quantized:
        return to_blocks([artifact.quantized[path] for path in paths], tensor)
    dtype = _float_dtype(tensor, float_type)
    floats = [np.asarray(artifact.floats[path], np.float32).astype(dtype) for path in paths]
    return to_floats(floats, tensor)


def _float_dtype(tensor: Tensor, float_type: str) -> Any:
    return _FLOATS[float_type] if tensor.is_matrix else np.float32


def _has_factors(config: ModelConfig) -> bool:
    return "full" in config.layer_kinds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contents:
    """A GGUF file, read: its key/values, the config they describe, and the arrays by our paths."""

    keys: dict[str, Any]
    config: ModelConfig
    arrays: dict[str, QArray | np.ndarray]


def read_gguf(path: Path) -> dict[str, QArray | np.ndarray]:
    """Returns the arrays of a GGUF file by our paths: `QArray` for ggml's blocks, else float32
    or float16 as stored.

    Raises: FileNotFoundError; InputError for a file that is not a Gemma 4 GGUF, or whose tensors
        are not the ones its key/values promise.
    Exactness: undoes `write_gguf` bit for bit.
    """
    return read_contents(path).arrays


def read_contents(path: Path) -> Contents:
    """Returns a whole GGUF file, arrays by our paths; raises as `read_gguf` does."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    gguf = _gguf()
    try:
        reader = gguf.GGUFReader(path)
        keys = {name: field.contents() for name, field in reader.fields.items()}
        stored = {tensor.name: tensor for tensor in reader.tensors}
    except Exception as error:
        # gguf-py has no error type of its own: damage shows as whatever its parsing runs into.
        raise InputError(f"{path}: not a readable GGUF file ({error})") from None
    if keys.get("general.architecture") != ARCHITECTURE:
        found = keys.get("general.architecture")
        raise InputError(f"{path}: architecture {found!r} given, {ARCHITECTURE!r} expected")
    try:
        return _contents(keys, stored)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    except (ArithmeticError, LookupError, TypeError) as error:
        raise InputError(f"{path}: keys that do not fit together ({error})") from None


def _contents(keys: dict[str, Any], stored: dict[str, Any]) -> Contents:
    shapes = {name: tuple(reversed(t.shape.tolist())) for name, t in stored.items()}
    if "token_embd.weight" not in stored:
        raise InputError("tensor token_embd.weight: missing")
    factors = stored.pop(ROPE_FACTORS).data if ROPE_FACTORS in stored else None
    config = config_of(keys, shapes, factors)
    arrays: dict[str, QArray | np.ndarray] = {}
    for name, tensor in tensors_of(config).items():
        if name not in stored:
            raise InputError(f"tensor {name}: missing")
        if shapes[name] != tensor.shape:
            raise InputError(f"tensor {name}: shape {shapes[name]} given, {tensor.shape} expected")
        paths = [parameter.path for parameter in tensor.parameters]
        arrays.update(zip(paths, _arrays(stored.pop(name), tensor), strict=True))
    if stored:
        name = next(iter(stored))
        close = nearest(name, tensors_of(config))
        raise InputError(
            f"{len(stored)} unknown tensors, first {name!r} (nearest: {close or 'none'})"
        )
    return Contents(keys=keys, config=config, arrays=arrays)


def _arrays(stored: Any, tensor: Tensor) -> list[QArray] | list[np.ndarray]:
    kind = stored.tensor_type.name
    if kind in BLOCKS_NAMED and tensor.parameters[0].is_site:
        return from_blocks(stored.data, tensor, BLOCKS_NAMED[kind])
    if kind not in ("F32", "F16"):
        known = ", ".join([*BLOCKS_NAMED, "F32", "F16"])
        raise InputError(f"tensor {tensor.name}: type {kind} given, one of {known} expected")
    return from_floats(stored.data, tensor)


def _gguf() -> Any:
    try:
        import gguf
    except ImportError:
        raise InputError("GGUF files need the package `gguf`: pip install gguf") from None
    return gguf
