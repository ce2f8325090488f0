"""The mobile schema of the hub, `quant_method: gemma`: written, and read with its codes kept as codes.

| ours | in the file |
|---|---|
| codes of a linear layer | `<module>.weight`: uint8 [out, bytes], offset binary; int8 [out, in] at 8 bits |
| its scales | `<module>.weight_scale` float32 [out, 1] |
| static scales of its input, output | `<module>.input_activation_scale`, `.output_activation_scale`, float32 [] |
| codes and scales of a table | `<module>.embedding_quantized`, `.embedding_scale` float32 [rows, blocks] |
| static scales of keys and values | `self_attn.k_cache_scale`, `.v_cache_scale`, float32 [] |
| the rest | as in a float checkpoint |

The first code is in the lowest bits; a static scale of 0 is no rounding. `quantization_config` gives every module its
bits by regular expressions, in order: the first that matches counts. Those written here match a module each once.

The per-layer table has a scale per row and layer, [V, L]; so have the released files. transformers 5.23 allocates
[V, 1] and refuses [V, L] by its shape, though its layer computes with either. Where the scales of all layers of a row
are equal the file has [V, 1], which says the same and loads there; both are read.

Source: huggingface/transformers `integrations/gemma_quant.py` and `quantizers/quantizer_gemma.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from gemma_qat.checkpoint.safetensors_file import Tensor
from gemma_qat.errors import InputError
from gemma_qat.export.artifact import Artifact
from gemma_qat.export.hub import HubOptions, verify_source, write_directory
from gemma_qat.export.hub_floats import float_tensors
from gemma_qat.export.hub_rows import (
    is_table,
    module_of,
    patterns,
    row_shape,
    scale_rows,
    word_bytes,
    word_rows,
)
from gemma_qat.export.mobile_read import open_mobile
from gemma_qat.export.prepared import untied, with_identities
from gemma_qat.models.declare import declare
from gemma_qat.quant import scale_path
from gemma_qat.quant.sites import EXPERTS, Parameter

_LINEAR_SCALES = {
    "input_scale": "input_activation_scale",
    "output_scale": "output_activation_scale",
}
CACHE_SCALES = {"key_cache_scale": "k_cache_scale", "value_cache_scale": "v_cache_scale"}
_SIGN = np.uint8(128)
_COLUMNS = (
    "The per-layer embedding has a scale per row and layer, [V, L], as in the released files. transformers 5.23 "
    "allocates [V, 1] and refuses these by their shape."
)


def export_mobile(
    artifact: Artifact, out: Path, options: HubOptions = HubOptions()
) -> dict[str, int]:
    """Writes a directory of the mobile schema, reads it back, and only then lets it appear.

    Returns {"bytes", "tensors", "differing_codes", ...}.
    Raises: InputError for what the schema cannot say; ValueError when what was written reads back as something else.
        `out` is then as it was before.
    """
    refuse_unless_mobile(untied(artifact))
    whole = with_all_scales(artifact)
    tensors = [*_tensors(whole, options)]
    wide = any(t.name.endswith(".embedding_scale") and t.shape[1] > 1 for t in tensors)

    def verify(directory: Path) -> dict[str, int]:
        with open_mobile(directory) as source:
            return verify_source(whole, source, directory)

    return write_directory(
        whole, out, tensors, format="mobile", options=options, verify=verify,
        quantization=mobile_config(whole), notes=[_COLUMNS] if wide else [],
    )  # fmt: skip


def with_all_scales(artifact: Artifact) -> Artifact:
    """Returns the artifact as the schema has it: the head apart, and both static scales at every linear layer."""
    whole = untied(artifact)
    declared = declare(whole.config)
    return with_identities(whole, [p for p in whole.plans if not is_table(declared[p])])


def refuse_unless_mobile(artifact: Artifact) -> None:
    """Raises InputError for what the schema cannot say: floats, experts, tiles, other codes, dynamic rounding."""
    if not artifact.plans:
        raise InputError("the mobile schema is for quantized checkpoints; this one is float")
    declared = declare(artifact.config)
    for path, plan in artifact.plans.items():
        grid, parameter = plan.weight, declared[path]
        start = f"recipe {artifact.recipe} has no mobile form: {path}"
        if parameter.role in EXPERTS:
            raise InputError(f"{start} is a matrix of experts, for which the schema has no place")
        if grid.format not in ("int2", "int4", "int8") or grid.tile is not None:
            tile = "" if grid.tile is None else f" in tiles of {grid.tile}"
            raise InputError(f"{start} is {grid.format}{tile}; int2, int4 or int8 per row expected")
        if grid.scale_dtype != "float32":
            raise InputError(f"{start} has {grid.scale_dtype} scales, float32 expected")
        for name, how in plan.activations.items():
            if how.bits != 8 or not how.is_static or (is_table(parameter) and name[0] in "io"):
                raise InputError(f"{start} rounds {name[:-6]} to {how}; static int8 expected")
        if parameter.role == "per_layer_embed" and parameter.shape[2] * grid.number.bits % 8:
            raise InputError(f"{start}: {parameter.shape[2]} codes of a layer fill no whole bytes")


def mobile_config(artifact: Artifact) -> dict[str, Any]:
    """Returns the `quantization_config` of a checkpoint: bits by module, as ordered regular expressions."""
    declared = declare(artifact.config)
    modules = {module_of(p): p for p in declared.values() if p.is_site and p.role not in EXPERTS}
    by_bits: dict[int, set[str]] = {}
    for name, parameter in modules.items():
        if parameter.path in artifact.plans:
            bits = artifact.plans[parameter.path].weight.number.bits
            by_bits.setdefault(bits, set()).add(name)
    left = {name for name, parameter in modules.items() if parameter.path not in artifact.plans}
    return {
        "quant_method": "gemma",
        "num_bits": 4,
        "quantize_embeddings": True,
        "module_quant_configs": {
            pattern: {"num_bits": bits}
            for bits, names in sorted(by_bits.items())
            for pattern in patterns(names, set(modules))
        },
        "modules_to_not_convert": _left_out(left),
    }


def _left_out(modules: set[str]) -> list[str]:
    """Names as transformers matches them: at the end of a module's name, at a dot or at the start of it."""
    everywhere = ("per_layer_model_projection", "router.proj", "lm_head", "embed_tokens")
    found = {next((e for e in everywhere if name.endswith(e)), name) for name in modules}
    return sorted(found)


def _tensors(artifact: Artifact, options: HubOptions) -> Iterator[Tensor]:
    yield from float_tensors(artifact, options.stored)
    for path, parameter in declare(artifact.config).items():
        plan = artifact.plans.get(path)
        if plan is None:
            continue
        table = is_table(parameter)
        yield from _codes(artifact, parameter)
        names = {} if table else _LINEAR_SCALES
        for name, foreign_name in names.items():
            scale = artifact.floats[scale_path(path, name)]
            yield _scalar(f"{module_of(parameter)}.{foreign_name}", scale)
        if plan.cache is not None:
            attention = module_of(parameter).removesuffix(".k_proj")
            for name, foreign_name in CACHE_SCALES.items():
                scale = artifact.floats[scale_path(path, name)]
                yield _scalar(f"{attention}.{foreign_name}", scale)


def _codes(artifact: Artifact, parameter: Parameter) -> Iterator[Tensor]:
    q, module = artifact.quantized[parameter.path], module_of(parameter)
    bits, rows = q.grid.number.bits, row_shape(parameter)
    names = ("weight", "weight_scale")
    if is_table(parameter):
        names = ("embedding_quantized", "embedding_scale")

    def words() -> np.ndarray:
        stored = word_rows(q, rows)
        return (stored ^ _SIGN).view(np.int8) if bits == 8 else stored

    width = word_bytes(parameter, bits)
    yield Tensor(
        name=f"{module}.{names[0]}", dtype="I8" if bits == 8 else "U8", shape=(*rows, width),
        make=words,
    )  # fmt: skip
    scale = row_scales(scale_rows(q, rows))
    yield Tensor(name=f"{module}.{names[1]}", dtype="F32", shape=scale.shape, make=lambda: scale)


def row_scales(
    scale: Float[np.ndarray, "rows blocks"],
) -> Float[np.ndarray, "rows blocks_or_1"]:
    """Returns the scales of rows as they are stored: one column where all columns agree, bit by bit."""
    bits = scale.view(np.uint32)
    return scale[:, :1] if (bits == bits[:, :1]).all() else scale


def _scalar(name: str, scale: Any) -> Tensor:
    value = np.asarray(scale, np.float32).reshape(())
    return Tensor(name=name, dtype="F32", shape=(), make=lambda: value)
