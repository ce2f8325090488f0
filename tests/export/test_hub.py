"""Directories of the hub: what was written is read back as the same model, and the card says what it is."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from gemma_qat.checkpoint.huggingface import read_parameters
from gemma_qat.cli.main import main
from gemma_qat.export import (
    EXPORTERS,
    Artifact,
    HubOptions,
    export_compressed_tensors,
    export_huggingface,
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


@pytest.mark.parametrize("recipe", ["mobile_like", "w8a8", "ternary"])
def test_other_recipes_as_compressed_tensors(case, recipe: str, tmp_path: Path):
    """If it fails, a recipe of integers is written as another model, or not at all."""
    config = dataclasses.replace(
        size_named("tiny_31b"), name="small", layer_kinds=("sliding", "sliding", "full"),
        vocab_size=64,
    )  # fmt: skip
    artifact = case.artifact(config, recipe)
    export_compressed_tensors(artifact, tmp_path / "out", HubOptions(tables="packed"))
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
    artifact = case.artifact(case.small_moe(), "q4_0")
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
