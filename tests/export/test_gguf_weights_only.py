"""Recipes whose grids or activations GGUF has no words for: exact codes, counted scales, a label, and blocks by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import gguf
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_qat.export import export_gguf, figures, open_gguf, read_gguf
from gemma_qat.export.gguf_grids import as_blocks
from gemma_qat.models import declare
from gemma_qat.numerics import Grid

gguf.constants.GGML_QUANT_SIZES.setdefault(42, (64, 18))


def _q2_0(data: np.ndarray) -> np.ndarray:
    """Values of Q2_0 blocks [rows, bytes], from `block_q2_0`: float16 d, then codes of 2 bits, low ones first."""
    blocks = data.reshape(data.shape[0], -1, 18)
    d = np.ascontiguousarray(blocks[..., :2]).view("<f2").astype(np.float32)
    codes = np.stack([(blocks[..., 2:] >> (2 * j)) & 3 for j in range(4)], -1).reshape(
        *d.shape[:2], 64
    )
    return ((codes.astype(np.float32) - 1) * d).reshape(data.shape[0], -1)


def _tensors(path: Path) -> dict[str, tuple[int, np.ndarray]]:
    """Type number and values of each quantized tensor, by readers that are not ours."""
    data, found = path.read_bytes(), {}
    for name, info in _infos(path).items():
        number, shape, start, size = info
        raw = np.frombuffer(data, np.uint8, size, start).reshape(shape[0], -1)
        if number == 42:
            found[name] = number, _q2_0(raw)
        else:
            found[name] = number, gguf.dequantize(raw, gguf.GGMLQuantizationType(number))
    return found


def _infos(path: Path) -> dict[str, tuple[int, tuple[int, ...], int, int]]:
    """Where tensors are, by our header: gguf-py 0.19 stops at the type Q2_0."""
    from gemma_qat.export.gguf_header import TYPES, read_header

    numbers = {name: number for number, (name, _, _) in TYPES.items()}
    matrices = {n: t for n, t in read_header(path).tensors.items() if t.kind not in ("F32", "F16")}
    return {n: (numbers[t.kind], t.shape, t.start, t.bytes) for n, t in matrices.items()}


@pytest.fixture(scope="module")
def mobile(case, tmp_path_factory):
    """A mobile artifact whose rows 64 divides but for one, its file and what exporting said."""
    config = case.smallest(width=128, ffn_width=96, shared_ffn_width=192)
    artifact = case.artifact(config, "mobile")
    whole = {p: _in_range(q) for p, q in artifact.quantized.items()}
    artifact = dataclasses.replace(artifact, quantized=whole)
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    return artifact, path, export_gguf(artifact, path)


def _in_range(q):
    scale = np.abs(np.asarray(q.scale)) + np.float32(2e-4)
    scale.flat[0] = 0.25  # a float16
    return dataclasses.replace(q, scale=jnp.asarray(np.minimum(scale, np.float32(6e4))))


def test_mobile_blocks_by_hand(case, mobile) -> None:
    """If this fails, 2-, 4- or 8-bit channels mean other weights in llama.cpp than in training, scales aside."""
    artifact, path, size = mobile
    stored = _tensors(path)
    rounded = 0
    for name, site, kind in (
        ("token_embd.weight", "embed/table", 42),
        ("output.weight", "head/table", 42),
        ("per_layer_token_embd.weight", "per_layer/embed/table", 2),
        ("blk.0.attn_q.weight", "layers/0/attn/q/kernel", 2),
        ("blk.0.ffn_down.weight", "layers/0/ffn/down/kernel", 2),
        ("blk.3.ffn_up.weight", "layers/3/ffn/up/kernel", 42),
        ("blk.3.proj.weight", "layers/3/per_layer/projection/kernel", 8),
    ):
        q = artifact.quantized[site]
        halved = case.halved(q)
        assert stored[name][0] == kind, name
        np.testing.assert_array_equal(
            stored[name][1], case.by_hand(site, np.asarray(halved.dequantize())), err_msg=name
        )
    for q in artifact.quantized.values():
        half = np.asarray(q.scale).astype(np.float16).astype(np.float32)
        rounded += int((half != np.asarray(q.scale)).sum())
    assert size["rounded_scales"] == rounded > 100


def test_weights_only_is_written_on_the_file(mobile) -> None:
    """If this fails, a file without the static scales it was trained with passes for the whole model."""
    from gemma_qat.export.gguf_header import read_header

    keys = read_header(mobile[1]).keys
    assert keys["gemma_qat.weights_only"] is True
    assert keys["general.description"].startswith("Weights only: recipe mobile was trained with")
    assert keys["gemma_qat.rounded_scales"] == mobile[2]["rounded_scales"]
    assert keys["gemma_qat.recipe"] == "mobile"
    with open_gguf(mobile[1]) as source:
        assert source.recipe == "gguf"  # the static scales are gone: no longer what `mobile` means
        assert not any(plan.activations for plan in source.plans.values())
        assert source.plans["embed/table"].weight == Grid(
            format="int2", tile=64, scale_dtype="float16"
        )


def test_a_row_of_96_is_written_in_four_bits(case) -> None:
    """If this fails, a 2-bit row that 64 does not divide is refused, or cut where it must not be."""
    artifact = case.artifact(case.smallest(width=96), "mobile")
    site = "layers/3/ffn/up/kernel"
    q, parameter = _in_range(artifact.quantized[site]), declare(artifact.config)[site]
    form, _ = as_blocks(q, parameter)
    assert form.grid == Grid(format="q4_0")
    np.testing.assert_array_equal(form.dequantize(), case.halved(q).dequantize())


def test_tiles_of_int4_are_q4_0(case, tmp_path: Path) -> None:
    """w4a16: bfloat16 scales of training's size are float16 too. If this fails, its files are rounded without need."""
    artifact = case.artifact(case.smallest(), "w4a16")
    whole = {p: case.constant(q, 0.0123) for p, q in artifact.quantized.items()}
    artifact = dataclasses.replace(artifact, quantized=whole)
    assert export_gguf(artifact, tmp_path / "m.gguf")["rounded_scales"] == 0
    read = read_gguf(tmp_path / "m.gguf")
    for path, q in artifact.quantized.items():
        np.testing.assert_array_equal(np.asarray(read[path].codes) - 8, q.codes, err_msg=path)
        assert set(np.unique(read[path].scale).tolist()) == set(np.unique(q.scale).tolist())


def test_q8_0_activations_are_llama_cpps_own(case, tmp_path: Path) -> None:
    """If this fails, a recipe that llama.cpp runs as it was trained is called weights only, or loses its name."""
    artifact = case.artifact(case.smallest(), "q4_0+q8_0_acts")
    export_gguf(artifact, tmp_path / "m.gguf")
    with open_gguf(tmp_path / "m.gguf") as source:
        assert (source.recipe, source.plans) == ("q4_0+q8_0_acts", artifact.plans)
    assert "gemma_qat.weights_only" not in gguf.GGUFReader(tmp_path / "m.gguf").fields


def test_figures_of_a_weights_only_file(mobile) -> None:
    """If it fails, `export --verify` of a mobile GGUF ends in an error, or counts what the file never promised."""
    found = figures(mobile[0], "gguf", mobile[1])
    assert [found[f"differing_{name}"] for name in ("codes", "scales", "floats")] == [0, 0, 0]
