"""Directories of the hub: every bit where the format's own description puts it, and read back as what was written."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from gemma_qat.checkpoint.hf_config import read_config
from gemma_qat.checkpoint.huggingface import read_parameters
from gemma_qat.cli.main import main
from gemma_qat.export import (
    EXPORTERS,
    Artifact,
    HubOptions,
    export_compressed_tensors,
    export_huggingface,
    export_mobile,
    figures,
    model_of,
    open_compressed_tensors,
    open_mobile,
)
from gemma_qat.export.compressed_tensors import as_written
from gemma_qat.export.huggingface import requantized
from gemma_qat.models import declare, fit, size_named, unstack_layers
from gemma_qat.numerics import QArray, quantize
from gemma_qat.quant import Activation

PACKED = HubOptions(tables="packed")


def _moe() -> Any:
    return dataclasses.replace(
        size_named("tiny_26b_a4b"), name="small_moe", layer_kinds=("sliding", "full"), vocab_size=64
    )


@pytest.fixture(scope="module")
def mobile(case, tmp_path_factory) -> tuple[Artifact, Path]:
    """An artifact of the mobile schema and its directory."""
    artifact = case.artifact(case.smallest(), "mobile")
    directory = tmp_path_factory.mktemp("hub") / "mobile"
    export_mobile(artifact, directory)
    return artifact, directory


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
    artifact = case.artifact(_moe(), "w4a16")
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


@pytest.mark.parametrize("recipe", ["mobile_like", "w8a8", "ternary"])
def test_other_recipes_as_compressed_tensors(case, recipe: str, tmp_path: Path):
    """If it fails, a recipe of integers is written as another model, or not at all."""
    config = dataclasses.replace(
        size_named("tiny_31b"), name="small", layer_kinds=("sliding", "sliding", "full"),
        vocab_size=64,
    )  # fmt: skip
    artifact = case.artifact(config, recipe)
    export_compressed_tensors(artifact, tmp_path / "out", PACKED)
    found = figures(artifact, "compressed-tensors", tmp_path / "out")
    assert [found[f"differing_{what}"] for what in ("codes", "scales", "floats")] == [0, 0, 0]
    whole = as_written(artifact, packed_tables=True)
    for path, q in artifact.quantized.items():
        assert np.array_equal(whole.quantized[path].dequantize(), q.dequantize()), path


def test_zero_scales_are_no_rounding(case, tmp_path: Path):
    """If it fails, an imported site that rounds nothing comes to divide by zero."""
    artifact = case.artifact(case.smallest(), "mobile")
    path = "layers/0/ffn/up/kernel"
    floats = artifact.floats | {f"{path}_output_scale": np.zeros(1, np.float32)}
    imported = dataclasses.replace(artifact, floats=floats, imported=True)
    export_compressed_tensors(imported, tmp_path / "out")
    with open_compressed_tensors(tmp_path / "out") as source:
        assert source.plans[path].output is None
        assert source.plans[path].input == Activation()


def test_float_values(case, tmp_path: Path):
    """If it fails, a float directory is another model: its values, its shards, or its two dtypes."""
    artifact = case.artifact(_moe(), "q4_0")
    export_huggingface(artifact, tmp_path / "f32", HubOptions(shard_bytes=100_000))
    assert len(list((tmp_path / "f32").glob("model-*-of-*.safetensors"))) > 2
    config, read = read_parameters(tmp_path / "f32")
    assert dataclasses.replace(config, name=artifact.config.name) == artifact.config
    for path, array in read.items():
        q = artifact.quantized.get(path)
        expected = artifact.floats[path] if q is None else np.asarray(q.dequantize())
        assert np.array_equal(array, expected), path
    export_huggingface(artifact, tmp_path / "bf16", HubOptions(dtype="bfloat16"))
    _, half = read_parameters(tmp_path / "bf16")
    name = "layers/1/experts/up/kernel"
    assert np.array_equal(half[name], read[name].astype(half[name].dtype))


def _rounded(recipe: str) -> Artifact:
    """Random weights of one layer, rounded to nearest."""
    one = dataclasses.replace(size_named("tiny_31b"), layer_kinds=("full",), vocab_size=64)
    fitted, rng = fit(one, recipe), np.random.default_rng(3)
    rounding = jax.jit(quantize, static_argnums=(1, 2))
    quantized, floats = {}, {}
    for path, parameter in declare(fitted.config).items():
        weight = rng.standard_normal(parameter.shape).astype(np.float32)
        if path in fitted.plans:
            quantized[path] = rounding(weight, fitted.plans[path].weight, parameter.reduced)
        else:
            floats[path] = weight
    return Artifact(
        config=fitted.config, recipe=recipe, plans=fitted.plans, quantized=quantized, floats=floats
    )


def test_lattice_requantizes(tmp_path: Path):
    """If it fails, the model card says something else of the float32 lattice than what is true of it."""
    same, saturating = _rounded("q4_0"), _rounded("w4a16")
    assert requantized(same)["changed"] == 0
    # Of bfloat16 values the codes survive; what moves are the scales.
    assert requantized(same, "bfloat16")["changed"] == 0
    # A tile whose extremum is positive saturates at 7 of 8 steps: about half of them, and their scales shrink.
    assert requantized(saturating)["changed"] > 0.05 * requantized(saturating)["codes"]
    for artifact, said in ((same, "to the same codes again"), (saturating, "use the stored codes")):
        export_huggingface(artifact, tmp_path / artifact.recipe)
        assert said in (tmp_path / artifact.recipe / "README.md").read_text()
    learned = {
        path: dataclasses.replace(plan, scales="learned") for path, plan in same.plans.items()
    }
    export_huggingface(dataclasses.replace(same, plans=learned), tmp_path / "learned")
    assert "authoritative" in (tmp_path / "learned/README.md").read_text()


def test_model_of_an_export_is_the_model(case, mobile):
    """If it fails, what --verify measures is not what stands in the file."""
    artifact, directory = mobile
    model = model_of(artifact, "mobile", directory)
    leaves = unstack_layers(model.leaves(), model.config, dict(model.plans))
    found = leaves["layers/0/attn/q/kernel"].unpack()
    assert np.array_equal(found.codes, artifact.quantized["layers/0/attn/q/kernel"].codes)


def test_model_card(case, tmp_path: Path):
    """If it fails, an export does not say what it is, what it was made of, or what it kept."""
    estimate = {"value": 0.25, "low": 0.2, "high": 0.3}
    summary = {"nll": estimate, "kl_mean": estimate, "top1_agreement": estimate}
    report = {"title": "A run", "recipes": {"w4a16": {"methods": {"qat": summary}}}}
    artifact = dataclasses.replace(
        case.artifact(case.smallest(), "w4a16"), provenance={"step": 1234, "run": {"name": "mine"}}
    )
    (tmp_path / "tokenizer.json").write_text("{}")
    options = HubOptions(report=report, beside=(tmp_path / "tokenizer.json",))
    export_compressed_tensors(artifact, tmp_path / "out", options)
    card = (tmp_path / "out/README.md").read_text()
    facts = json.loads((tmp_path / "out/gemma_qat.json").read_text())
    for said in ("w4a16", "| attn_q |", "| step | 1234 |", "0.2500 [0.2000, 0.3000]", '"mine"'):
        assert said in card
    assert facts["sha256"]["model.safetensors"] in card
    assert (tmp_path / "out/tokenizer.json").read_text() == "{}"


def test_released_layout(case, mobile, tmp_path: Path):
    """If it fails, a released file (prefix, towers, unused keys and values, nested config) is not read as ours is."""
    from safetensors.numpy import save_file

    artifact, directory = mobile
    stored = load_file(directory / "model.safetensors")
    released = {
        name.replace("model.", "model.language_model.", 1): array for name, array in stored.items()
    }
    dead = "model.language_model.layers.3.self_attn.k_proj."
    for part in ("weight", "weight_scale", "input_activation_scale"):
        released[dead + part] = stored[f"model.layers.1.self_attn.k_proj.{part}"]
    released["model.vision_tower.patch.weight"] = np.zeros((2, 2), np.float32)
    save_file(released, tmp_path / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    quantization = config.pop("quantization_config")
    nested = {"model_type": "gemma4", "text_config": config, "quantization_config": quantization}
    (tmp_path / "config.json").write_text(json.dumps(nested))
    with open_mobile(tmp_path) as source:
        read = {leaf.path: leaf for leaf in source.leaves}
        assert source.recipe == "mobile"
        assert sorted(source.left)[-1] == "model.vision_tower.patch.weight"
        assert len(source.left) == 4
        assert set(read) >= set(declare(source.config))
        for path, q in artifact.quantized.items():
            found = read[path].read()
            assert isinstance(found, QArray)
            assert np.array_equal(found.codes, q.codes) and np.array_equal(found.scale, q.scale)


@pytest.mark.parametrize(
    ("format", "recipe"), [("mobile", "mobile"), ("compressed-tensors", "w4a16")]
)
def test_there_and_back(case, format: str, recipe: str, tmp_path: Path, capsys):
    """If it fails, a quantized release does not come through conversion and export as the same bytes."""
    EXPORTERS[format](case.artifact(case.smallest(), recipe), tmp_path / "one")
    assert main(["convert", str(tmp_path / "one"), "--out", str(tmp_path / "native")]) == 0
    back = ["export", str(tmp_path / "native"), "--format", format, "--out", str(tmp_path / "two")]
    assert main(back) == 0
    one, two = (tmp_path / name / "model.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    assert "read back equal" in capsys.readouterr().out
