"""A checkpoint of the mobile schema as a LiteRT model, or a bundle of it: refused, converted, written, read back.

artifact -> what it may not be        (`as_written`)
         -> the graph of each signature, without weights    (`graph.py`, `convert.py`)
         -> weights constant, sites quantized, one file     (`stored.py`, `quantize.py`, `file.py`)
         -> read again and compared, and taken by the runtime, before it appears
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gemma_qat.checkpoint.appear import appearing_file, scratch_file
from gemma_qat.checkpoint.manifest import Manifest
from gemma_qat.checkpoint.source import Reading
from gemma_qat.errors import InputError
from gemma_qat.export.artifact import Artifact
from gemma_qat.export.check import compare
from gemma_qat.export.hub_rows import is_table, on_host
from gemma_qat.export.litert import file
from gemma_qat.export.litert.bundle import SUFFIX, check_tokenizer, write_bundle
from gemma_qat.export.litert.convert import converted
from gemma_qat.export.litert.graph import DECODE, PREFILL, Lengths, cache_scales, stablehlo
from gemma_qat.export.litert.quantize import Whole, joined
from gemma_qat.export.litert.read import METADATA, looks_like_litert, open_litert
from gemma_qat.export.litert.run import LiteRTModel
from gemma_qat.export.litert.stored import Stored, refuse_scales, stored, stored_shapes
from gemma_qat.export.mobile import refuse_unless_mobile
from gemma_qat.export.prepared import untied
from gemma_qat.models import ModelConfig, declare, static_scale_paths
from gemma_qat.quant import Plans, scale_path

Progress = Callable[[int, int], object]


def export_litert(
    artifact: Artifact, out: Path, lengths: Lengths = Lengths(), progress: Progress | None = None
) -> dict[str, int]:
    """Writes a `.tflite` model, or a `.litertlm` bundle by the ending of `out`; reads it back before it appears.

    Returns {"bytes", "tensors"}. `progress` is told (bytes written, bytes in all).
    Raises: InputError for what the format cannot carry, an operation the runtime lacks, or tools that are not
        installed; ValueError when what was written reads back as something else. `out` is then as it was before.
    """
    _refuse_name(out)
    whole = as_written(artifact)
    slots = lengths.slots(whole.config)
    if out.suffix == SUFFIX:
        check_tokenizer(whole)
    with appearing_file(out) as partial:
        if out.suffix != SUFFIX:
            counts = _written(whole, partial, lengths, progress)
        else:
            with scratch_file(out) as model:
                counts = _written(whole, model, lengths, progress)
                write_bundle(whole, model, partial, slots)
        size = partial.stat().st_size
    return {"bytes": size, "tensors": counts["tensors"]}


def as_written(artifact: Artifact) -> Artifact:
    """Returns the artifact as the file has it, with a head of its own.

    Raises: InputError for what is not of the mobile schema, or has a site whose activations are not rounded.
    """
    whole = untied(artifact)
    refuse_unless_mobile(whole)
    declared, config = declare(whole.config), whole.config
    expected = cache_scales(config)
    for path in whole.plans:
        if not is_table(declared[path]):
            expected += [scale_path(path, name) for name in ("input_scale", "output_scale")]
    statics = set(static_scale_paths(whole.plans))
    for full in expected:
        if full not in statics or float(whole.floats[full][0]) == 0:
            raise InputError(
                f"{full}: no rounding there, and LiteRT multiplies codes with codes: every quantized matrix needs "
                "static scales of its input and output, and every layer of its keys and values"
            )
        refuse_scales(full, np.asarray(whole.floats[full], np.float32))
    return _without_empty_rows(whole)


def _without_empty_rows(whole: Artifact) -> Artifact:
    """Returns the artifact with a scale of 1 in the place of 0, for rows whose values are all 0 in any case.

    XNNPACK takes no model with a scale of 0.
    """
    quantized, declared = dict(whole.quantized), declare(whole.config)
    for path, q in whole.quantized.items():
        scale = np.asarray(q.scale)
        if not is_table(declared[path]) and (scale == 0).any():
            codes = np.where(scale == 0, np.int8(0), np.asarray(q.codes))
            scale = np.where(scale == 0, np.float32(1), scale)
            quantized[path] = dataclasses.replace(q, codes=on_host(codes), scale=on_host(scale))
    return dataclasses.replace(whole, quantized=quantized)


def _written(
    whole: Artifact, path: Path, lengths: Lengths, progress: Progress | None
) -> dict[str, int]:
    write_model(
        path, whole.config, whole.plans, whole.quantized, whole.floats, recipe=whole.recipe,
        lengths=lengths, progress=progress,
    )  # fmt: skip
    with open_litert(path) as source:
        counts = compare(whole, Reading(source))
    wrong = {name: n for name, n in counts.items() if n and name != "tensors"}
    if wrong:
        raise ValueError(f"{path}: read back with {wrong}")
    _run_once(path)
    return counts


def _run_once(path: Path) -> None:
    """Has the runtime take the model and compute a token with it: what it refuses, it refuses here."""
    model = LiteRTModel(path)
    caches = model.prefill(np.zeros(1, np.int32), model.empty())
    logits, _ = model.decode(0, 1, caches) if model.slots > 1 else model.decode(0, 0, caches)
    if not np.isfinite(logits).all():
        raise ValueError(f"{path}: logits that are not finite")


def write_model(
    path: Path,
    config: ModelConfig,
    plans: Plans,
    quantized: Mapping[str, Any],
    floats: Mapping[str, Any],
    *,
    recipe: str,
    lengths: Lengths = Lengths(),
    progress: Progress | None = None,
    taps: bool = False,
) -> int:
    """Writes a `.tflite` model and returns its bytes; arrays are asked for one at a time and let go.

    `quantized` (`QArray`s or `PackedArray`s) and `floats` by checkpoint path. Where these mappings read an array when
    it is asked for, no more than the largest is held, whatever the size of the model. `taps`: its signatures return the
    codes around every product, too (`quantize.joined`).
    """
    sites = stored(config, plans, quantized, floats)
    whole = _whole(config, plans, sites, recipe, lengths, taps)
    return file.write(path, whole, sites, progress)


def model_bytes(
    config: ModelConfig, plans: Plans, recipe: str, lengths: Lengths = Lengths()
) -> int:
    """Returns the bytes of a model's `.tflite` file from shapes alone; its graph is converted for it.

    Exactness: to the byte where every matrix has its own scale of its input. Those that share input and scale, as q, k
    and v do after calibration, share its codes, which is some 100 bytes less each.
    """
    sites = stored_shapes(config, plans)
    return file.place(_whole(config, plans, sites, recipe, lengths), sites)


def _whole(
    config: ModelConfig, plans: Plans, sites: Mapping[str, Stored], recipe: str, lengths: Lengths,
    taps: bool = False,
) -> Whole:  # fmt: skip
    models = []
    for signature in (PREFILL, DECODE):
        text, inputs, outputs = stablehlo(config, lengths, signature)
        models.append(converted(text, signature, inputs, outputs))
    manifest = Manifest(kind="packed", config=config, recipe=recipe, plans=plans)
    said = json.dumps(manifest.to_json(), sort_keys=True)
    return joined(models, sites, {METADATA: said.encode()}, taps=taps)


def _refuse_name(out: Path) -> None:
    if out.suffix not in (".tflite", SUFFIX) and not out.is_dir():
        raise InputError(
            f"{out}: a name that ends in .tflite, or in {SUFFIX} for a bundle, expected"
        )
    if out.is_file() and out.stat().st_size and not looks_like_litert(out):
        raise InputError(f"{out}: there is a file that is no LiteRT model, which is not replaced")
