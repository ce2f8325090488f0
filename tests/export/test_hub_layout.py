"""Directories of the hub: every bit where the format's own description puts it, every module with its own bits."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from gemma_qat.checkpoint.hf_config import read_config
from gemma_qat.export import (
    Artifact,
    HubOptions,
    export_compressed_tensors,
    export_mobile,
    open_compressed_tensors,
)

PACKED = HubOptions(tables="packed")


@pytest.fixture(scope="module")
def tiled(case, tmp_path_factory) -> tuple[Artifact, Path]:
    """A Q4_0 artifact, scales of both signs, and its compressed-tensors directory with packed tables."""
    artifact = case.artifact(case.smallest(layer_kinds=("sliding", "full"), shared_kv_layers=0))
    directory = tmp_path_factory.mktemp("hub") / "tiled"
    export_compressed_tensors(artifact, directory, PACKED)
    return artifact, directory


def _codes(stored: np.ndarray, bits: int) -> np.ndarray:
    """Signed codes of rows of bytes, one code at a time: the k-th is the k-th field of the row's bit stream."""
    rows = stored.view(np.uint8).reshape(stored.shape[0], -1)
    streams = np.unpackbits(rows, axis=1, bitorder="little").reshape(len(rows), -1, bits)
    return (streams @ (1 << np.arange(bits))) - (1 << (bits - 1))


def test_mobile_tensors_bit_by_bit(case, mobile):
    """If it fails, transformers' layers would compute with other codes or scales than training did."""
    artifact, directory = mobile
    stored = load_file(directory / "model.safetensors")
    at = "model.layers.0."
    for name, path in (("self_attn.q_proj", "attn/q"), ("mlp.down_proj", "ffn/down")):
        q = artifact.quantized[f"layers/0/{path}/kernel"]
        assert stored[f"{at}{name}.weight"].dtype == np.uint8
        expected = case.by_hand(f"layers/0/{path}/kernel", np.asarray(q.codes))
        assert np.array_equal(_codes(stored[f"{at}{name}.weight"], 4), expected)
        assert np.array_equal(
            stored[f"{at}{name}.weight_scale"].ravel(), np.asarray(q.scale).ravel()
        )
    gate = artifact.quantized["layers/0/per_layer/gate/kernel"]
    found = stored[at + "per_layer_input_gate.weight"]
    assert found.dtype == np.int8 and np.array_equal(found, np.asarray(gate.codes).T)
    table = artifact.quantized["per_layer/embed/table"]
    assert np.array_equal(
        _codes(stored["model.embed_tokens_per_layer.embedding_quantized"], 4),
        np.asarray(table.codes).reshape(64, -1),
    )
    scale = stored["model.embed_tokens_per_layer.embedding_scale"]
    assert np.array_equal(scale, np.asarray(table.scale)[..., 0])
    cache = stored[at + "self_attn.k_cache_scale"]
    assert cache.shape == () and cache == np.float32(0.5)
    assert stored["lm_head.output_activation_scale"].shape == ()
    assert "model.layers.2.self_attn.k_cache_scale" not in stored  # shares its keys


def test_mobile_config_gives_every_module_its_bits(case, mobile):
    """If it fails, a module is taken for one of another width, or float ones for packed ones."""
    artifact, directory = mobile
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    names = {
        "head/table": "lm_head", "embed/table": "model.embed_tokens",
        "per_layer/embed/table": "model.embed_tokens_per_layer",
        "layers/1/ffn/up/kernel": "model.layers.1.mlp.up_proj",
        "layers/2/ffn/up/kernel": "model.layers.2.mlp.up_proj",
        "layers/3/per_layer/projection/kernel": "model.layers.3.per_layer_projection",
        "layers/3/attn/o/kernel": "model.layers.3.self_attn.o_proj",
    }  # fmt: skip
    for path, module in names.items():
        found = [
            how["num_bits"]
            for pattern, how in config["module_quant_configs"].items()
            if re.search(pattern, module)
        ]
        assert found == [artifact.plans[path].weight.number.bits], module
    assert config["modules_to_not_convert"] == ["per_layer_model_projection"]
    assert [config[k] for k in ("quant_method", "quantize_embeddings")] == ["gemma", True]


def test_per_layer_scales_in_one_column(case, mobile, tmp_path: Path):
    """If it fails, equal scales of all layers are not stored as transformers 5.23 allocates them, or not read back."""
    artifact = case.artifact(case.smallest(), "mobile")
    table = artifact.quantized["per_layer/embed/table"]
    scale = np.array(table.scale)
    scale[:] = scale[:, :1]
    path = "per_layer/embed/table"
    even = artifact.quantized | {path: dataclasses.replace(table, scale=scale)}
    even = dataclasses.replace(artifact, quantized=even)
    assert export_mobile(even, tmp_path / "out")["differing_scales"] == 0
    stored = load_file(tmp_path / "out/model.safetensors")
    assert stored["model.embed_tokens_per_layer.embedding_scale"].shape == (64, 1)
    refused = "transformers 5.23 allocates [V, 1] and refuses these"  # those with a column for every layer
    assert refused not in (tmp_path / "out/README.md").read_text()
    assert refused in (mobile[1] / "README.md").read_text()


def test_compressed_words_bit_by_bit(case, tiled):
    """If it fails, compressed-tensors would unpack other codes; q4_0's scales keep their signs."""
    artifact, directory = tiled
    stored = load_file(directory / "model.safetensors")
    path, name = "layers/1/attn/o/kernel", "model.layers.1.self_attn.o_proj"
    q = artifact.quantized[path]
    words, scale = stored[f"{name}.weight_packed"], stored[f"{name}.weight_scale"]
    assert (words.dtype, scale.dtype) == (np.int32, np.float16)
    assert (scale < 0).any() and (scale > 0).any()
    codes = _codes(words, 4)
    assert codes.shape == tuple(stored[f"{name}.weight_shape"])
    values = codes * np.repeat(scale.astype(np.float32), 32, axis=1)
    assert np.array_equal(values, case.by_hand(path, np.asarray(q.dequantize())))
    head, table = stored["lm_head.weight_packed"], stored["model.embed_tokens.weight_packed"]
    assert np.array_equal(head, table)
    assert not read_config(directory / "config.json").ties_head


def _group(config: dict[str, Any], module: str) -> list[dict[str, Any]]:
    return [
        group
        for group in config["config_groups"].values()
        if any(re.match(t.removeprefix("re:"), module) for t in group["targets"])
    ]


def test_compressed_groups(case, tmp_path: Path):
    """If it fails, a module has no scheme, two, or the wrong one; w4a16 is one group of all linear layers."""
    export_compressed_tensors(case.artifact(case.smallest(), "mobile"), tmp_path / "mixed", PACKED)
    config = json.loads((tmp_path / "mixed/config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    for module, bits, group, rounded in (
        ("model.layers.3.mlp.gate_proj", 2, None, True), ("model.layers.0.mlp.gate_proj", 4, None, True),
        ("model.layers.0.per_layer_projection", 8, None, True), ("model.embed_tokens", 2, None, False),
        ("model.embed_tokens_per_layer", 4, 32, False), ("lm_head", 2, None, True),
    ):  # fmt: skip
        (found,) = _group(config, module)
        assert (found["weights"]["num_bits"], found["weights"]["group_size"]) == (bits, group)
        for side in ("input_activations", "output_activations"):
            how = found[side]
            assert (how is not None) == rounded
            assert how is None or (how["strategy"], how["dynamic"]) == ("tensor", False)
    assert not _group(config, "model.per_layer_model_projection")
    with open_compressed_tensors(tmp_path / "mixed") as source:
        assert source.recipe == "mobile"
    export_compressed_tensors(case.artifact(case.smallest(), "w4a16"), tmp_path / "plain")
    config = json.loads((tmp_path / "plain/config.json").read_text())["quantization_config"]
    (group,) = config["config_groups"].values()
    assert (config["format"], group["targets"]) == ("pack-quantized", ["Linear"])
    assert set(config["ignore"]) == {"lm_head", "re:.*per_layer_model_projection$"}
    with open_compressed_tensors(tmp_path / "plain") as source:
        assert source.recipe == "w4a16"


def test_compressed_experts(case, tmp_path: Path):
    """If it fails, experts are skipped, or one has the codes of another."""
    artifact = case.artifact(case.small_moe(), "w4a16")
    size = export_compressed_tensors(artifact, tmp_path / "moe")
    assert size["differing_codes"] == 0
    stored = load_file(tmp_path / "moe/model.safetensors")
    found = _codes(stored["model.layers.1.experts.5.down_proj.weight_packed"], 4)
    expected = np.asarray(artifact.quantized["layers/1/experts/down/kernel"].codes)[5].T
    assert np.array_equal(found, expected)
    assert "model.layers.1.experts.gate_up_proj" not in stored
    assert stored["model.layers.1.router.proj.weight"].dtype == np.float32
    card = (tmp_path / "moe/README.md").read_text()
    assert "experts it has made up. Use the float directory" in card
    assert "transformers read these files" not in card
