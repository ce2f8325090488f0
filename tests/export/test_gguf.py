"""GGUF files, judged by gguf-py's own reader, name map and dequantization."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from gemma_qat.checkpoint.maps import foreign
from gemma_qat.export import (
    Artifact,
    compare,
    export_gguf,
    open_gguf,
    read_gguf,
    verify_gguf,
    write_gguf,
)
from gemma_qat.models import declare, fit, initialize, quantize_parameters, size_named

TWINS = ("tiny_e2b", "tiny_e4b", "tiny_12b", "tiny_26b_a4b", "tiny_31b")

# What gguf-py's name map leaves to its converter script.
_SPECIAL = {
    "router.scale": "ffn_gate_inp.scale",
    "router.per_expert_scale": "ffn_down_exps.scale",
}


@pytest.fixture(scope="module", params=TWINS)
def exported(case, request, tmp_path_factory):
    """An artifact of each twin and its exported file."""
    artifact = case.twin(request.param)
    path = tmp_path_factory.mktemp("gguf") / f"{request.param}.gguf"
    size = export_gguf(artifact, path)
    assert size["bytes"] == path.stat().st_size
    return artifact, path, size


def _name(parameter, layers: int) -> str:
    """The tensor's name by gguf-py's table, from the Hugging Face name."""
    name = foreign(parameter).name
    for special, found in _SPECIAL.items():
        if name.endswith(special):
            return f"blk.{parameter.layer}.{found}"
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA4, layers)
    prefix = "" if name.startswith("lm_head") else "model."
    found = table.get_name(prefix + name, try_suffixes=(".weight",))
    assert found is not None, name
    return found if found.endswith(".weight") else f"{found}.weight"


def _expected(case, artifact, path: str) -> np.ndarray:
    q = artifact.quantized.get(path)
    if q is None:
        return case.by_hand(path, artifact.floats[path])
    codes = np.asarray(q.codes, np.float32) - 8
    scale = np.repeat(np.asarray(q.scale, np.float32), 32, axis=q.reduced[0])
    return case.by_hand(path, codes * scale.reshape(codes.shape))


def test_tensors_by_an_independent_reader(case, exported):
    """If this fails, llama.cpp would multiply by other weights than training did."""
    artifact, path, size = exported
    tensors = {t.name: t for t in gguf.GGUFReader(path).tensors}
    wanted: dict[str, list[str]] = {}
    for parameter in declare(artifact.config).values():
        name = _name(parameter, artifact.config.layers)
        wanted.setdefault(name, []).append(parameter.path)
    assert set(tensors) == {*wanted, "rope_freqs.weight"}
    assert size["tensors"] == len(tensors)
    for name, paths in wanted.items():
        parts = [_expected(case, artifact, p) for p in paths]
        expected = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
        found = gguf.dequantize(tensors[name].data, tensors[name].tensor_type)
        assert tuple(reversed(tensors[name].shape.tolist())) == expected.shape, name
        assert np.array_equal(found, expected), name
        quantized = paths[0] in artifact.quantized
        assert tensors[name].tensor_type.name == ("Q4_0" if quantized else "F32"), name


def test_dequantize_agrees_with_ours(case, exported):
    """If this fails, the codes in the file stand for other numbers than QArray.dequantize gives."""
    artifact, path, _ = exported
    stored = {t.name: t for t in gguf.GGUFReader(path).tensors}
    for site in ("embed/table", "layers/1/attn/o/kernel", "layers/0/attn/q/kernel"):
        tensor = stored[_name(declare(artifact.config)[site], artifact.config.layers)]
        ours = np.asarray(artifact.quantized[site].dequantize())
        found = gguf.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(found, case.by_hand(site, ours)), site


def test_keys(exported):
    """If this fails, llama.cpp would build another network from the same weights."""
    artifact, path, _ = exported
    config = artifact.config
    keys = {n: f.contents() for n, f in gguf.GGUFReader(path).fields.items()}
    at = {n.removeprefix("gemma4."): v for n, v in keys.items() if n.startswith("gemma4.")}
    widths = [s.ffn_width for s in config.layer_shapes()]
    heads = [
        config.kv_heads if k == "sliding" else config.global_kv_heads for k in config.layer_kinds
    ]
    assert keys["general.architecture"] == "gemma4"
    assert keys["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_0
    assert keys["general.quantization_version"] == 2
    assert keys["tokenizer.ggml.model"] == "none"
    assert at["block_count"] == len(config.layer_kinds)
    assert at["vocab_size"] == config.vocab_size
    assert at["context_length"] == config.max_positions
    assert at["embedding_length"] == config.width
    assert at["embedding_length_per_layer_input"] == config.per_layer_width
    assert at["feed_forward_length"] == (widths if config.shared_ffn_width else config.ffn_width)
    same = config.kv_heads == config.global_kv_heads
    assert at["attention.head_count_kv"] == (config.kv_heads if same else heads)
    assert at["attention.head_count"] == config.query_heads
    for kind in ("key", "value"):
        assert at[f"attention.{kind}_length"] == config.global_head_width
        assert at[f"attention.{kind}_length_swa"] == config.head_width
    assert at["attention.sliding_window"] == config.window
    assert at["attention.sliding_window_pattern"] == [k == "sliding" for k in config.layer_kinds]
    assert at["attention.shared_kv_layers"] == config.shared_kv_layers
    assert np.float32(at["attention.layer_norm_rms_epsilon"]) == np.float32(1e-6)
    assert (at["rope.freq_base"], at["rope.freq_base_swa"]) == (1e6, 1e4)
    assert at["rope.dimension_count"] == config.global_head_width
    assert at["rope.dimension_count_swa"] == config.head_width
    assert at["final_logit_softcapping"] == 30.0
    experts = [at.get(f"expert_{name}") for name in ("count", "used_count", "feed_forward_length")]
    assert experts == ([8, 2, 64] if config.experts else [None, None, None])


def test_rope_factors(exported):
    """If this fails, global layers rotate pairs they must leave alone, or the other way round."""
    artifact, path, _ = exported
    (tensor,) = (t for t in gguf.GGUFReader(path).tensors if t.name == "rope_freqs.weight")
    half = artifact.config.global_head_width // 2
    assert tensor.data.dtype == np.float32
    assert tensor.data.tolist() == [1.0] * (half // 4) + [float(np.float32(1e30))] * (
        half - half // 4
    )


def test_read_back(exported):
    """If this fails, a file does not come back as what was written, or the comparison is blind."""
    artifact, path, _ = exported
    counts = compare(artifact, read_gguf(path))
    assert counts.pop("tensors") == len(declare(artifact.config))
    assert set(counts.values()) == {0}
    with open_gguf(path) as source:
        assert source.config == artifact.config
        assert (source.recipe, source.plans) == ("q4_0", artifact.plans)


def test_bytes_equal_ggml_of_the_weights(case, tmp_path: Path):
    """If this fails, a plain round-to-nearest export is not the file ggml's quantizer makes."""
    config = case.smallest(layer_kinds=("sliding", "full"), shared_kv_layers=0, shared_ffn_width=0)
    fitted = fit(config, "q4_0")
    parameters = initialize(fitted.config, 3)
    quantized = quantize_parameters(parameters, fitted)
    floats = {p: np.asarray(x) for p, x in parameters.items() if p not in fitted.plans}
    artifact = Artifact(
        config=fitted.config, recipe="q4_0", plans=fitted.plans, quantized=quantized, floats=floats
    )
    export_gguf(artifact, tmp_path / "m.gguf")
    stored = {t.name: t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    for site in fitted.plans:
        tensor = stored[_name(declare(fitted.config)[site], fitted.config.layers)]
        weight = np.ascontiguousarray(case.by_hand(site, np.asarray(parameters[site])))
        expected = gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q4_0)
        assert np.array_equal(tensor.data, expected), site


@pytest.mark.parametrize("float_type", ["f32", "f16", "bf16"])
def test_float_types(case, tmp_path: Path, float_type: Any):
    """If this fails, float matrices are stored in another type than asked for, or norms in half."""
    artifact = case.float_artifact(case.smallest())
    path = tmp_path / "float.gguf"
    export_gguf(artifact, path, float_type=float_type)
    for tensor in gguf.GGUFReader(path).tensors:
        expected = float_type.upper() if len(tensor.shape) > 1 else "F32"
        assert tensor.tensor_type.name == expected, tensor.name
    kind = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16"}[float_type]
    stored = gguf.GGUFReader(path).fields["general.file_type"].contents()
    assert stored == gguf.LlamaFileType[kind]
    found = read_gguf(path)["layers/0/attn/o/kernel"]
    expected = artifact.floats["layers/0/attn/o/kernel"]
    assert isinstance(found, np.ndarray)
    assert np.array_equal(found, expected.astype(found.dtype))


@pytest.mark.parametrize("float_type", ["f16", "bf16"])
def test_router_is_never_halved(case, tmp_path: Path, float_type: str):
    """If this fails, the router's logits are rounded and top-k choices flip."""
    path = tmp_path / "moe.gguf"
    write_gguf(case.twin("tiny_26b_a4b"), path, float_type=float_type)
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    assert {k for n, k in kinds.items() if "ffn_gate_inp" in n} == {"F32"}


def test_untied_head(case, tmp_path: Path):
    """If this fails, an output head of its own is lost and llama.cpp uses the embedding instead."""
    artifact = case.float_artifact(case.smallest(ties_head=False))
    export_gguf(artifact, tmp_path / "m.gguf")
    with open_gguf(tmp_path / "m.gguf") as source:
        assert not source.config.ties_head
    read = read_gguf(tmp_path / "m.gguf")
    assert np.array_equal(np.asarray(read["head/table"]), artifact.floats["head/table"])


def test_progress_counts_every_tensor(case, tmp_path: Path):
    """If this fails, a long export shows the wrong share done."""
    seen = []
    write_gguf(
        case.artifact(case.smallest()), tmp_path / "m.gguf",
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert [done for done, _ in seen] == list(range(1, seen[0][1] + 1))


def test_no_vocabulary_key_names_are_strange(exported):
    """If this fails, a key is not among those gguf-py knows, and llama.cpp would ignore it."""
    _, path, _ = exported
    known = set()
    for group in vars(gguf.Keys).values():
        known |= (
            {v for v in vars(group).values() if isinstance(v, str)}
            if isinstance(group, type)
            else set()
        )
    names = [n for n in gguf.GGUFReader(path).fields if not n.startswith("GGUF.")]
    strange = [n for n in names if re.sub("^gemma4", "{arch}", n) not in known]
    assert strange == ["gemma_qat.recipe"]


def test_compare_counts_what_differs(case):
    """If this fails, a changed code, scale or float would go unnoticed."""
    artifact = case.artifact(case.smallest())
    read: dict[str, Any] = {**artifact.quantized, **artifact.floats}
    site = artifact.quantized["layers/0/attn/q/kernel"]
    codes, scale = np.array(site.codes), np.array(site.scale)
    codes[0, 0, 0] ^= 1
    scale[0, 0, :2] = -scale[0, 0, :2]
    read["layers/0/attn/q/kernel"] = case.qarray(codes, scale, site.grid, site.reduced)
    read["final_norm/weight"] = np.nextafter(artifact.floats["final_norm/weight"], np.float32(9))
    counts = compare(artifact, read)
    assert counts["differing_codes"] == 1
    assert counts["differing_scales"] == 2
    assert counts["differing_floats"] == artifact.config.width
    del read["layers/0/scalar"]
    with pytest.raises(ValueError, match=r"layers/0/scalar: written but not read"):
        compare(artifact, read)


@pytest.mark.parametrize("size", ["e2b", "e4b", "12b", "26b_a4b", "31b"])
def test_full_sizes_are_not_refused(size: str):
    """If this fails, a released layout is refused, or its tensor names collide."""
    from gemma_qat.export.gguf_keys import config_keys, refuse_config
    from gemma_qat.export.gguf_map import tensors_of

    config = size_named(size)
    refuse_config(config)
    tensors = tensors_of(config)
    assert sum(len(t.parameters) for t in tensors.values()) == len(declare(config))
    assert config_keys(config)["gemma4.block_count"] == config.layers


def test_verify_refuses_another_artifact(case, tmp_path: Path):
    """If this fails, verification passes a file of other weights."""
    one, other = (case.artifact(case.smallest(), seed=s) for s in (0, 1))
    write_gguf(one, tmp_path / "m.gguf")
    assert verify_gguf(one, tmp_path / "m.gguf")["differing_codes"] == 0
    with pytest.raises(ValueError, match="differing codes"):
        verify_gguf(other, tmp_path / "m.gguf")
    assert (tmp_path / "m.gguf").is_file()


def test_googles_mix_of_three_types(case, tmp_path: Path):
    """Embedding Q6_K, per-layer table Q8_0 (256 does not divide its rows), matrices Q4_0: gguf-py's values are ours.

    If it fails, a `q4_0_google` file holds other numbers than were trained.
    """
    config = case.smallest(width=256)
    fitted = fit(config, "q4_0_google")
    parameters = initialize(fitted.config, 3)
    codes = quantize_parameters(parameters, fitted)
    floats = {path: np.asarray(x) for path, x in parameters.items() if path not in codes}
    artifact = Artifact(
        config=fitted.config, recipe="q4_0_google", plans=fitted.plans, quantized=codes, floats=floats
    )  # fmt: skip
    export_gguf(artifact, tmp_path / "m.gguf")
    counts = compare(artifact, read_gguf(tmp_path / "m.gguf"))
    assert {name: n for name, n in counts.items() if n} == {"tensors": len(codes) + len(floats)}
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    for name, path, kind in (
        ("token_embd.weight", "embed/table", "Q6_K"),
        ("per_layer_token_embd.weight", "per_layer/embed/table", "Q8_0"),
        ("blk.0.ffn_up.weight", "layers/0/ffn/up/kernel", "Q4_0"),
        ("per_layer_model_proj.weight", "per_layer/projection/kernel", "F16"),
    ):
        tensor = tensors[name]
        assert tensor.tensor_type.name == kind
        theirs = gguf.dequantize(tensor.data, tensor.tensor_type)
        if path not in codes:
            np.testing.assert_array_equal(theirs, case.by_hand(path, floats[path].astype("f2")))
            continue
        np.testing.assert_array_equal(
            theirs, case.by_hand(path, np.asarray(codes[path].dequantize()))
        )
