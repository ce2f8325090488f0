"""A GGUF file becomes a packed checkpoint and the same file again: no code, scale or float changes on the way."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from gemma_qat.checkpoint.store import read_manifest
from gemma_qat.convert import convert, format_of
from gemma_qat.export import Artifact, artifact_of, compare, export_gguf
from gemma_qat.models import fit, initialize, quantize_parameters, size_named


def test_there_and_back(tmp_path: Path) -> None:
    """If it fails, a released Q4_0 file is rounded a second time, or comes in as something else."""
    small = dataclasses.replace(
        size_named("tiny_12b"), name="small", layer_kinds=("sliding", "full"), vocab_size=64
    )
    fitted = fit(small, "q4_0")
    parameters = initialize(fitted.config, 3)
    codes = quantize_parameters(parameters, fitted)
    floats = {path: np.asarray(x) for path, x in parameters.items() if path not in codes}
    artifact = Artifact(
        config=small, recipe="q4_0", plans=fitted.plans, quantized=codes, floats=floats
    )
    export_gguf(artifact, tmp_path / "m.gguf")
    assert format_of(tmp_path / "m.gguf").name == "gguf"
    convert(tmp_path / "m.gguf", tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.recipe, manifest.config, manifest.kind) == ("q4_0", small, "packed")
    again = artifact_of(tmp_path / "out")
    counts = compare(artifact, {**again.quantized, **again.floats})
    assert {name: n for name, n in counts.items() if n} == {"tensors": len(codes) + len(floats)}
    export_gguf(again, tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "m.gguf").read_bytes()
