"""GGUF files of Gemma 4 for llama.cpp: ggml's codes and scales as they are, the rest in float.

| ours | in the file |
|---|---|
| sites on the grids q4_0, q8_0, q6_k | Q4_0, Q8_0, Q6_K: the same codes and scales |
| int2, int4, int8, ternary by channel or larger tiles | Q2_0, Q4_0, Q8_0: see `gguf_grids.py` |
| norms, scalars, the router | F32 |
| other float matrices | F32; F16 where the recipe's published files have it, or F16 or BF16 when asked for |

What a recipe rounds beside its weights: Q8_0 tiles (`q4_0+q8_0_acts`) are what llama.cpp does by itself. All else (the
static scales of `mobile`, int8 per token) the file cannot say: it is then labelled "weights only", in a key of ours and
in its description, and how many scales had to be rounded to float16 is written beside it.

Norm weights are stored as they multiply (nothing is added or taken away), heads are not permuted,
experts' gate and up rows stand in one tensor. Tensors are converted one at a time, so memory stays
near the largest of them.

Source: the GGUF specification (docs/gguf.md in ggml-org/ggml); gguf-py writes the container.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from gemma_qat.checkpoint.appear import appearing_file
from gemma_qat.errors import InputError, unknown
from gemma_qat.export.artifact import Artifact
from gemma_qat.export.gguf_blocks import BLOCKS, Blocks, to_blocks
from gemma_qat.export.gguf_grids import as_blocks, ggml_grid
from gemma_qat.export.gguf_header import TYPES
from gemma_qat.export.gguf_keys import (
    ARCHITECTURE,
    RECIPE_KEY,
    ROUNDED_KEY,
    WEIGHTS_ONLY_KEY,
    config_keys,
    refuse_config,
    rope_factors,
)
from gemma_qat.export.gguf_map import ROPE_FACTORS, Tensor, tensors_of, to_floats
from gemma_qat.export.gguf_vocab import KeyValues, vocabulary_keys
from gemma_qat.models.config import ModelConfig
from gemma_qat.numerics import Grid
from gemma_qat.quant import Plans
from gemma_qat.quant.sites import Parameter

_FLOATS: dict[str, Any] = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}
_RECIPE_FLOATS = {"q4_0_google": "f16"}
"""Recipes whose published files keep float matrices in another type than float32."""

# `llama_ftype`: what most of the file is; tensors say for themselves what they are.
_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "Q6_K": 18, "BF16": 32, "Q2_0": 41}
_NUMBERS = {name: number for number, (name, _, _) in TYPES.items()}


def write_gguf(
    artifact: Artifact,
    out: Path,
    *,
    float_type: str | None = None,
    verify: Callable[[Path], object] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> dict[str, int]:
    """Writes a GGUF file and returns {"bytes", "tensors", "rounded_scales"}.

    `float_type` (f32, f16, bf16) is that of float matrices, by default the recipe's; `verify` is called with the
    finished file before it appears as `out`; `progress` with (tensors written, tensors in all).

    Raises: InputError, before any file appears, for what GGUF cannot carry: a grid that has no form among ggml's
        blocks, a layout that llama.cpp does not run, a tokenizer of another size.
    Exactness: codes bit for bit, scales too where they are float16 (else rounded, and counted); floats unless
        `float_type` rounds them.
    """
    _refuse_to_replace(out)
    float_type = float_type or float_type_of(artifact.recipe)
    tensors = tensors_of(artifact.config)
    _refuse(artifact, tensors, float_type)
    keys = artifact_keys(artifact, float_type)
    with appearing_file(out) as partial:
        _write(artifact, tensors, keys, partial, float_type, progress)
        if verify is not None:
            verify(partial)
        size = partial.stat().st_size
    rounded = keys.get(ROUNDED_KEY, 0)
    assert isinstance(rounded, int)
    return {
        "bytes": size, "tensors": len(tensors) + has_factors(artifact.config), "rounded_scales": rounded,
    }  # fmt: skip


def _refuse_to_replace(out: Path) -> None:
    if not out.is_file():
        return
    with out.open("rb") as file:
        begins = file.read(4)
    if begins not in (b"", b"GGUF"):
        raise InputError(f"{out}: there is a file that is no GGUF, which is not replaced")


def float_type_of(recipe: str) -> str:
    """Returns the type of float matrices in a recipe's files: f32, or what its published files have."""
    return _RECIPE_FLOATS.get(recipe, "f32")


def artifact_keys(artifact: Artifact, float_type: str) -> KeyValues:
    """Returns every key/value the file of `artifact` holds.

    Raises: InputError when the tokenizer is not the model's, or for a scale that float16 cannot hold.
    """
    declared = {p.path: p for t in tensors_of(artifact.config).values() for p in t.parameters}
    rounded = sum(as_blocks(q, declared[path])[1] for path, q in artifact.quantized.items())
    keys = recipe_keys(artifact.config, artifact.recipe, artifact.plans, float_type)
    if rounded:
        keys[ROUNDED_KEY] = rounded
    vocabulary = vocabulary_keys(
        artifact.tokenizer, artifact.config.vocab_size, artifact.chat_template
    )
    return {**keys, **vocabulary}


def recipe_keys(config: ModelConfig, recipe: str, plans: Plans, float_type: str) -> KeyValues:
    """Returns the key/values of a model under a recipe, all but the vocabulary's."""
    keys: KeyValues = {
        "general.architecture": ARCHITECTURE,
        "general.type": "model",
        "general.name": config.name,
        "general.file_type": _file_type(config, plans, float_type),
        "general.quantization_version": 2,
        **config_keys(config),
    }
    if plans:
        keys[RECIPE_KEY] = recipe
    if weights_only(plans):
        keys[WEIGHTS_ONLY_KEY] = True
        keys["general.description"] = (
            f"Weights only: recipe {recipe} was trained with rounded activations, which this format cannot carry."
        )
    return keys


def weights_only(plans: Plans) -> bool:
    """Returns whether more is rounded than a GGUF file says and llama.cpp does by itself."""
    return any(how.per != "tile" for plan in plans.values() for how in plan.activations.values())


def kind_of(tensor: Tensor, plans: Plans, float_type: str) -> Blocks | Any:
    """Returns the blocks or the float dtype of a tensor.

    Raises: InputError naming a parameter whose grid has no form among ggml's blocks, or parameters of one tensor that
        differ.
    """
    kinds = {parameter.path: _blocks_of(parameter, plans) for parameter in tensor.parameters}
    found = list(kinds.values())
    if any(kind is not found[0] for kind in found):
        raise InputError(
            f"{tensor.name}: holds {' and '.join(kinds)}, all float or all on one grid expected"
        )
    return found[0] or (_FLOATS[float_type] if tensor.is_matrix else np.float32)


def _blocks_of(parameter: Parameter, plans: Plans) -> Blocks | None:
    plan = plans.get(parameter.path)
    if plan is None:
        return None
    grid = ggml_grid(plan.weight, parameter)
    if grid is None:
        known = ", ".join(blocks.name for blocks in BLOCKS.values())
        raise InputError(
            f"{parameter.path} is {_described(plan.weight)}, which has no form among ggml's blocks ({known})"
        )
    return BLOCKS[grid]


def _file_type(config: ModelConfig, plans: Plans, float_type: str) -> int:
    elements: dict[str, int] = {}
    for tensor in tensors_of(config).values():
        kind = kind_of(tensor, plans, float_type)
        name = _name(kind)
        elements[name] = elements.get(name, 0) + int(np.prod(tensor.shape, dtype=np.int64))
    return _FILE_TYPES[max(elements, key=lambda name: elements[name])]


def _name(kind: Blocks | Any) -> str:
    """What ggml calls the type of a tensor."""
    if isinstance(kind, Blocks):
        return kind.name
    return next(name.upper() for name, dtype in _FLOATS.items() if dtype is kind)


def _refuse(artifact: Artifact, tensors: Mapping[str, Tensor], float_type: str) -> None:
    if float_type not in _FLOATS:
        raise unknown("float type", float_type, _FLOATS)
    refuse_config(artifact.config)
    for tensor in tensors.values():
        try:
            kind = kind_of(tensor, artifact.plans, float_type)
        except InputError as error:
            raise InputError(f"recipe {artifact.recipe} has no GGUF form: {error}") from None
        if not isinstance(kind, Blocks) and kind is not np.float32:
            _refuse_overflow(artifact, [parameter.path for parameter in tensor.parameters], kind)


def _described(grid: Grid) -> str:
    tile = "per channel" if grid.tile is None else f"tile {grid.tile}"
    return f"{grid.format} {tile} ({grid.scale_dtype} scales, divisor {grid.divisor:g})"


def _refuse_overflow(artifact: Artifact, paths: list[str], kind: Any) -> None:
    limit = float(ml_dtypes.finfo(kind).max)
    for path in paths:
        top = float(np.max(np.abs(artifact.floats.get(path, 0.0))))
        if top > limit:
            raise InputError(
                f"{path}: {top:g} does not fit {np.dtype(kind).name} (at most {limit:g}); use float type f32"
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
    if has_factors(artifact.config):
        _declare(writer, ROPE_FACTORS, rope_factors(artifact.config).shape, np.float32)
    for tensor in tensors.values():
        kind = kind_of(tensor, artifact.plans, float_type)
        _declare(writer, tensor.name, tensor.shape, kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if has_factors(artifact.config):
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
        size = int(np.prod(shape, dtype=np.int64)) // kind.elements * kind.size
        # Any dtype but uint8: with that, the writer takes the shape for bytes and looks it up in a table of its own.
        writer.add_tensor_info(name, shape, np.dtype(np.int8), size, raw_dtype=_NUMBERS[kind.name])
    else:
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(kind).itemsize
        writer.add_tensor_info(name, shape, np.dtype(kind), size, raw_dtype=_NUMBERS[_name(kind)])


def _data(artifact: Artifact, tensor: Tensor, float_type: str) -> np.ndarray:
    kind = kind_of(tensor, artifact.plans, float_type)
    if isinstance(kind, Blocks):
        arrays = [as_blocks(artifact.quantized[p.path], p)[0] for p in tensor.parameters]
        return to_blocks(arrays, tensor)
    floats = [
        np.asarray(artifact.floats[p.path], np.float32).astype(kind) for p in tensor.parameters
    ]
    return to_floats(floats, tensor)


def has_factors(config: ModelConfig) -> bool:
    """Returns whether the file of a model has rotary divisors: where there are global layers."""
    return "full" in config.layer_kinds


def _gguf() -> Any:
    try:
        import gguf
    except ImportError:
        raise InputError("GGUF files need the package `gguf`: pip install gguf") from None
    return gguf
