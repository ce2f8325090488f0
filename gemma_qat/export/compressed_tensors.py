"""compressed-tensors directories: written, and read with their codes kept as codes.

| ours | in the file |
|---|---|
| int2, int4, tiled int8 (pack-quantized) | `<module>.weight_packed` int32 [out, words], `.weight_shape` int64 [2] |
| int8 with one scale per row (int-quantized) | `<module>.weight` int8 [out, in] |
| scales | `<module>.weight_scale` [out, tiles], in the dtype the recipe stores them in |
| static scales of input and output | `<module>.input_scale`, `.output_scale`, float32 [1] |
| static scales of keys and values | `self_attn.k_scale`, `.v_scale`, float32 [1]; `kv_cache_scheme` stays null |
| experts' matrices | a linear layer each: `experts.7.gate_proj.weight_packed` |
| the rest | as in a float checkpoint |

Codes are offset binary, the first in the lowest bits of little-endian words: our own words, padded to four bytes. Q4_0,
Q8_0 and ternary are written as the integers they are (`prepared.py`), Q4_0 with the signs of its scales. A quantized
embedding that is the head as well is written twice, since one packed tensor cannot be both modules.

Tables that are looked up hold their values in float, unless packed ones are asked for (what the released mobile
checkpoints have, for vLLM): transformers 5.23 cannot load a packed embedding of Gemma (its initializer wants a
`weight`, pull 48123), and SGLang takes zeros for one (pull 38224).

`quantization_config` has one group per way of quantizing. Where a group is all linear layers but the ignored ones its
target is the class `Linear`, as in the released files; else a target is a regular expression that matches its modules
and no others. The rounding of keys and values has its scales in the file, under the names that vLLM looks for, but no
scheme: transformers 5.23 would look for scales in KV-sharing layers too, which have none.

Source: vllm-project/compressed-tensors 0.20 (`compressors/pack_quantized`, `compressors/naive_quantized`); names of
experts as in sgl-project/sglang pull 25105 and NVIDIA/Model-Optimizer pull 1219.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32, UInt8

from gemma_qat.checkpoint.safetensors_file import Tensor
from gemma_qat.errors import InputError
from gemma_qat.export.artifact import Artifact
from gemma_qat.export.compressed_groups import groups_of, is_plain
from gemma_qat.export.compressed_read import open_compressed_tensors
from gemma_qat.export.hub import HubOptions, verify_source, write_directory
from gemma_qat.export.hub_floats import float_tensors
from gemma_qat.export.hub_rows import (
    columns,
    expert,
    is_table,
    module_of,
    row_shape,
    scale_rows,
    word_bytes,
    word_rows,
)
from gemma_qat.export.prepared import (
    as_integers,
    tables_in_float,
    untied,
    without_identities,
    without_token_caches,
)
from gemma_qat.models.declare import declare
from gemma_qat.numerics import QArray
from gemma_qat.quant import Plan, scale_path
from gemma_qat.quant.sites import EXPERTS, Parameter

_SIGN = np.uint8(128)
_SCALES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_CACHES = (
    "Keys and values were rounded in training, with a scale per token. The files cannot say that: it is the runtime "
    "that chooses the type of its cache (int8 per token and head is what was trained)."
)
_TABLES = (
    "Tables that are looked up (embedding, per-layer embedding) were trained on a grid; here they hold its values in "
    "float, since most runtimes do not look up in packed tables. The head, where it is quantized, is packed."
)
_PACKED_TABLES = (
    "Tables that are looked up (embedding, per-layer embedding) are packed, as vLLM reads them. transformers 5.23 "
    "cannot load a packed embedding of Gemma (its initializer wants a `weight`, pull request 48123), and SGLang reads "
    "zeros for one (pull request 38224): float tables (`--tables float`) are for these."
)
_LINEAR_EXPERTS = (
    "Every expert is a linear layer of its own, as vLLM's loader of Gemma 4 takes them. transformers knows only the "
    "fused float tensor: it warns that these are unexpected and goes on with experts it has made up. Use the float "
    "directory (`--format huggingface`) there."
)
_CACHE = {"key_cache_scale": "k_scale", "value_cache_scale": "v_scale"}


def export_compressed_tensors(
    artifact: Artifact, out: Path, options: HubOptions = HubOptions()
) -> dict[str, int]:
    """Writes a compressed-tensors directory, reads it back, and only then lets it appear.

    Returns {"bytes", "tensors", "differing_codes", ...}.
    Raises: InputError for what the format cannot say; ValueError when what was written reads back as something else.
        `out` is then as it was before.
    """
    whole = as_written(artifact, packed_tables=options.tables == "packed")
    _refuse(whole)
    notes = [*_readers(whole)]
    if without_token_caches(artifact).plans != artifact.plans:
        notes.append(_CACHES)
    if whole.plans.keys() != untied(artifact).plans.keys():
        notes.append(_TABLES)

    def verify(directory: Path) -> dict[str, int]:
        with open_compressed_tensors(directory) as source:
            return verify_source(whole, source, directory)

    return write_directory(
        whole, out, [*_tensors(whole, options)], format="compressed-tensors", options=options,
        verify=verify, quantization=compressed_config(whole), notes=notes,
    )  # fmt: skip


def _readers(artifact: Artifact) -> Iterator[str]:
    """What the card says of the programs that read these files."""
    declared = declare(artifact.config)
    planned = [declared[path] for path in artifact.plans]
    said = {
        _PACKED_TABLES: any(is_table(parameter) for parameter in planned),
        _LINEAR_EXPERTS: any(parameter.role in EXPERTS for parameter in planned),
    }
    yield from (note for note, so in said.items() if so)
    if not any(said.values()):
        yield "vLLM, SGLang and transformers read these files."


def as_written(artifact: Artifact, *, packed_tables: bool) -> Artifact:
    """Returns the artifact on the grids, with the head and the roundings, that the format has for it."""
    whole = without_token_caches(without_identities(untied(artifact)))
    return as_integers(whole if packed_tables else tables_in_float(whole))


def compressed_config(artifact: Artifact) -> dict[str, Any]:
    """Returns the `quantization_config` of an artifact as `as_written` gives it."""
    groups, ignored = groups_of(artifact)
    formats = {group["format"] for group in groups}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
        "ignore": ignored,
        "kv_cache_scheme": None,
    }


def _refuse(artifact: Artifact) -> None:
    if not artifact.plans:
        raise InputError("compressed-tensors is for quantized checkpoints; this one is float")
    declared = declare(artifact.config)
    for path, plan in artifact.plans.items():
        start = f"recipe {artifact.recipe} has no compressed-tensors form: {path}"
        if is_table(declared[path]) and (plan.input or plan.output):
            raise InputError(f"{start} is looked up, and rounds activations")
        for how in plan.activations.values():
            if how.per not in ("tensor", "token"):
                raise InputError(
                    f"{start} rounds activations to {how}; one scale or one per token expected"
                )
        if declared[path].role == "per_layer_embed" and (
            declared[path].shape[2] * plan.weight.number.bits % 8
        ):
            raise InputError(f"{start}: the codes of one layer fill no whole bytes")


def _tensors(artifact: Artifact, options: HubOptions) -> Iterator[Tensor]:
    yield from float_tensors(artifact, options.stored)
    for path, parameter in declare(artifact.config).items():
        plan = artifact.plans.get(path)
        if plan is None:
            continue
        q, module = artifact.quantized[path], module_of(parameter)
        matrices = {module: q}
        if parameter.role in EXPERTS:
            matrices = {module.format(i): expert(q, i) for i in range(parameter.shape[0])}
        for name, matrix in matrices.items():
            yield from _codes(matrix, parameter, name)
            yield from _static(artifact, path, plan, name)


def _static(artifact: Artifact, path: str, plan: Plan, module: str) -> Iterator[Tensor]:
    attention = module.removesuffix(".k_proj")
    for name in plan.static_scales:
        full = f"{attention}.{_CACHE[name]}" if name in _CACHE else f"{module}.{name}"
        value = np.asarray(artifact.floats[scale_path(path, name)], np.float32).reshape(1)
        yield Tensor(name=full, dtype="F32", shape=(1,), make=functools.partial(np.copy, value))


def _codes(q: QArray, parameter: Parameter, module: str) -> Iterator[Tensor]:
    bits, rows = q.grid.number.bits, row_shape(parameter)[-1:]
    width = word_bytes(parameter, bits)
    tiles = q.scale.size // rows[0]
    if is_plain(q.grid, parameter):
        yield Tensor(
            name=f"{module}.weight", dtype="I8", shape=(*rows, width),
            make=lambda: (word_rows(q, rows) ^ _SIGN).view(np.int8),
        )  # fmt: skip
    else:
        shape = np.asarray([*rows, columns(parameter)], "<i8")
        yield Tensor(
            name=f"{module}.weight_packed", dtype="I32", shape=(*rows, -(-width // 4)),
            make=lambda: _int32(word_rows(q, rows)),
        )  # fmt: skip
        yield Tensor(name=f"{module}.weight_shape", dtype="I64", shape=(2,), make=lambda: shape)
    yield Tensor(
        name=f"{module}.weight_scale", dtype=_SCALES[q.grid.scale_dtype], shape=(*rows, tiles),
        make=lambda: scale_rows(q, rows),
    )  # fmt: skip


def _int32(words: UInt8[np.ndarray, "rows bytes"]) -> Int32[np.ndarray, "rows words"]:
    """Returns rows of bytes as little-endian int32, padded with zeros."""
    padded = np.pad(words, ((0, 0), (0, -words.shape[1] % 4)))
    return np.ascontiguousarray(padded).view("<i4")
