"""A GGUF file as a source: which recipe it is, what is left over, codes kept, nothing read before it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_qat.errors import InputError
from gemma_qat.export import export_gguf, open_gguf
from gemma_qat.models import size_named
from gemma_qat.numerics import Grid, QArray

Change = Callable[[str, np.ndarray, Any], tuple[np.ndarray, Any] | None]


def rewritten(
    source: Path, out: Path, change: Change, more: dict[str, np.ndarray], leave_out: str = ""
) -> None:
    """Another program's file: gguf-py's writer, tensors changed, dropped (None) or added, one key left out."""
    reader, writer = gguf.GGUFReader(source), gguf.GGUFWriter(out, "gemma4")
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in ("general.architecture", leave_out):
            continue
        inside = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents(), field.types[0], inside)
    for tensor in reader.tensors:
        changed = change(tensor.name, tensor.data, tensor.tensor_type)
        if changed is not None:
            writer.add_tensor(tensor.name, changed[0], raw_dtype=changed[1])
    for name, data in more.items():
        kind = gguf.GGMLQuantizationType.Q4_0 if data.dtype == np.uint8 else None
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def files(case, tmp_path_factory) -> tuple[Any, Path]:
    """A q4_0 artifact and its file."""
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    artifact = case.artifact(case.smallest())
    export_gguf(artifact, path)
    return artifact, path


def test_a_file_of_another_program(files, tmp_path: Path) -> None:
    """BF16 floats, K of a layer that shares it, no softcap key. If it fails, only our own files can be read."""
    artifact, path = files
    rng = np.random.default_rng(0)
    projection = np.asarray(jnp.asarray(rng.standard_normal((128, 64)), jnp.bfloat16))

    def change(name: str, data: np.ndarray, kind: Any) -> tuple[np.ndarray, Any]:
        if name == "per_layer_model_proj.weight":
            return projection.view(np.uint8), gguf.GGMLQuantizationType.BF16
        return data, kind

    more = {"blk.3.attn_k.weight": np.zeros((64, 64), np.float32)}
    rewritten(path, tmp_path / "m.gguf", change, more, "gemma4.final_logit_softcapping")
    with open_gguf(tmp_path / "m.gguf") as source:
        assert (source.format, source.recipe, source.config) == ("gguf", "q4_0", artifact.config)
        assert source.left == {
            "blk.3.attn_k.weight": "unused K/V of a KV-sharing layer",
            "rope_freqs.weight": "rotary divisors, made from the config",
        }
        leaves = {leaf.path: leaf for leaf in source.leaves}
        leaf = leaves["per_layer/projection/kernel"]
        assert (leaf.dtype, leaf.bytes) == ("bfloat16", projection.nbytes)
        found = leaf.read()
        assert isinstance(found, np.ndarray) and found.dtype == jnp.bfloat16
        np.testing.assert_array_equal(found.reshape(64, 128), projection.T)
        site = leaves["layers/0/ffn/up/kernel"]
        codes = site.read()
        assert site.dtype == "int4" and isinstance(codes, QArray)
        np.testing.assert_array_equal(codes.codes, artifact.quantized[site.path].codes)
    with pytest.raises(InputError, match="closed, blk.0.ffn_up.weight can no longer be read"):
        site.read()


def test_a_mix_of_no_recipe(case, files, tmp_path: Path) -> None:
    """If it fails, a file whose embedding is Q8_0 passes for q4_0, or cannot be read."""
    artifact, path = files

    def change(name: str, data: np.ndarray, kind: Any) -> tuple[np.ndarray, Any]:
        if name != "token_embd.weight":
            return data, kind
        wide = gguf.GGMLQuantizationType.Q8_0
        return gguf.quantize(np.linspace(-1, 1, 64 * 64, dtype="f4").reshape(64, 64), wide), wide

    rewritten(path, tmp_path / "m.gguf", change, {})
    with open_gguf(tmp_path / "m.gguf") as source:
        assert source.recipe == "gguf"
        assert source.plans["embed/table"].weight == Grid(format="q8_0")
        assert source.plans.keys() == artifact.plans.keys()


def test_experts_whose_gate_and_up_stand_apart(case, tmp_path: Path) -> None:
    """In one layer of three, gate on another grid: if it fails, a file of another program is not read, or mixed up."""
    config = case.dataclasses.replace(
        size_named("tiny_26b_a4b"), vocab_size=64, layer_kinds=("sliding", "sliding", "full")
    )
    artifact, path = case.artifact(config), tmp_path / "m.gguf"
    export_gguf(artifact, path)
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    gate, up = np.split(stored["blk.1.ffn_gate_up_exps.weight"], 2, axis=1)
    exact = gguf.dequantize(gate, gguf.GGMLQuantizationType.Q4_0)

    def change(name: str, data: np.ndarray, kind: Any) -> tuple[np.ndarray, Any] | None:
        return None if name == "blk.1.ffn_gate_up_exps.weight" else (data, kind)

    named = {
        gguf.TENSOR_NAMES[kind].format(bid=1) + ".weight": data
        for kind, data in (
            (gguf.MODEL_TENSOR.FFN_GATE_EXP, exact.astype(np.float32)),
            (gguf.MODEL_TENSOR.FFN_UP_EXP, up),
        )
    }
    assert list(named) == ["blk.1.ffn_gate_exps.weight", "blk.1.ffn_up_exps.weight"]
    rewritten(path, tmp_path / "apart.gguf", change, named)
    with open_gguf(tmp_path / "apart.gguf") as source:
        assert source.config == config and source.recipe == "gguf"
        assert artifact.plans.keys() - source.plans.keys() == {"layers/1/experts/gate/kernel"}
        found = {leaf.path: leaf for leaf in source.leaves}
        floats = found["layers/1/experts/gate/kernel"].read()
        assert isinstance(floats, np.ndarray) and floats.dtype == np.float32
        np.testing.assert_array_equal(floats, exact.transpose(0, 2, 1))
        for name in ("layers/1/experts/up/kernel", "layers/0/experts/gate/kernel"):
            codes = found[name].read()
            assert isinstance(codes, QArray)
            np.testing.assert_array_equal(codes.codes, artifact.quantized[name].codes)
            np.testing.assert_array_equal(codes.scale, artifact.quantized[name].scale)
    codes_too = {**named, "blk.1.ffn_gate_exps.weight": gate}
    rewritten(path, tmp_path / "same.gguf", change, codes_too)
    with open_gguf(tmp_path / "same.gguf") as source:
        assert (source.recipe, source.plans) == ("q4_0", artifact.plans)
    for missing in named:
        rest = {name: data for name, data in named.items() if name != missing}
        rewritten(path, tmp_path / "half.gguf", change, rest)
        with (
            pytest.raises(InputError, match=r"blk\.1\.ffn_(gate|up|gate_up)_exps.weight: missing"),
            open_gguf(tmp_path / "half.gguf"),
        ):
            pass
    rewritten(path, tmp_path / "both.gguf", lambda name, data, kind: (data, kind), named)
    with pytest.raises(InputError, match="unknown tensors"), open_gguf(tmp_path / "both.gguf"):
        pass


@pytest.mark.parametrize(
    ("dropped", "more", "expected"),
    [
        ("blk.1.ffn_up.weight", {}, "tensor blk.1.ffn_up.weight: missing"),
        ("", {"v.patch": np.zeros(3, np.float32)}, "1 unknown tensors, first 'v.patch'"),
        ("", {"blk.0.attn_k.bias": np.zeros(3, np.float32)}, "unknown tensors, first 'blk.0.attn_k"),
    ],
)  # fmt: skip
def test_missing_and_unknown_tensors(files, dropped, more, expected, tmp_path: Path) -> None:
    """If it fails, a tensor is left out by silence, or made up."""
    change: Change = lambda name, data, kind: None if name == dropped else (data, kind)  # noqa: E731
    rewritten(files[1], tmp_path / "m.gguf", change, more)
    with pytest.raises(InputError, match=expected), open_gguf(tmp_path / "m.gguf"):
        pass


def test_a_released_size_has_its_name(case, tmp_path: Path) -> None:
    """If it fails, a file called otherwise is another model to us, or its name becomes a path."""
    twin = case.dataclasses.replace(size_named("tiny_12b"), name="../Gemma 4 it")
    export_gguf(case.artifact(twin), tmp_path / "a.gguf")
    with open_gguf(tmp_path / "a.gguf") as source:
        assert source.config == size_named("tiny_12b")
    other = case.smallest(name="../Gemma 4 it")
    export_gguf(case.artifact(other), tmp_path / "b.gguf")
    with open_gguf(tmp_path / "b.gguf") as source:
        assert source.config.name == "_Gemma_4_it"


def test_large_tables_come_in_pieces(case, files, monkeypatch) -> None:
    """If it fails, decoding in pieces gives other codes than decoding at once."""
    from gemma_qat.export import gguf_blocks

    artifact, path = files
    monkeypatch.setattr(gguf_blocks, "_PIECE", 1000)
    with open_gguf(path) as source:
        (leaf,) = (leaf for leaf in source.leaves if leaf.path == "per_layer/embed/table")
        found = leaf.read()
    assert isinstance(found, QArray)
    np.testing.assert_array_equal(found.codes, artifact.quantized[leaf.path].codes)
    np.testing.assert_array_equal(found.scale, artifact.quantized[leaf.path].scale)
