"""Spoilt files of Hugging Face directories: if these fail, a broken download is read in silence or ends in a traceback."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_directory import refused

from gemma_qat.checkpoint.huggingface import open_huggingface, read_parameters
from gemma_qat.errors import InputError

Make = Callable[..., Any]
Q = "model.layers.1.self_attn.q_proj.weight"


def test_missing_tensor(hugging_face: Make) -> None:
    made = hugging_face("tiny_e2b")
    del made.tensors[Q]
    refused(made.write(), "layers.1.self_attn.q_proj.weight is missing", "nearest: layers.")


def test_extra_tensor(hugging_face: Make) -> None:
    made = hugging_face("tiny_e2b")
    made.tensors["model.layers.1.self_attn.q_prj.weight"] = np.zeros(3, np.float32)
    refused(made.write(), "unexpected tensor model.layers.1.self_attn.q_prj.weight", "q_proj")


def test_several_wrong_names(hugging_face: Make) -> None:
    """If it fails, a person who repairs a directory learns of one name at a time."""
    made = hugging_face("tiny_e2b")
    for layer in range(5):
        made.tensors[f"model.layers.{layer}.q.weight"] = made.tensors.pop(
            Q.replace("1", str(layer))
        )
    del made.tensors["model.norm.weight"]
    refused(
        made.write(), "6 tensors missing (layers.0.self_attn.q_proj.weight, layers.1.", ", ...)",
        "5 tensors unexpected (model.layers.0.q.weight, model.layers.1.q.weight,",
    )  # fmt: skip


@pytest.mark.parametrize("change", [lambda x: x[:-1], lambda x: x.T, lambda x: x[None]])
def test_misshaped_tensor(hugging_face: Make, change: Callable[[Any], Any]) -> None:
    made = hugging_face("tiny_e2b")
    made.tensors[Q] = np.ascontiguousarray(change(made.tensors[Q][:, :-3]))
    refused(made.write(), Q, f"has shape {list(made.tensors[Q].shape)}", "[256, 128] expected")


@pytest.mark.parametrize("keep", [0, 5, 100, -7])
def test_truncated_file(hugging_face: Make, keep: int) -> None:
    file = hugging_face("tiny_12b").write() / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(file.parent, "model.safetensors: not a readable safetensors file")


def test_garbage_file(hugging_face: Make) -> None:
    file = hugging_face("tiny_12b").write() / "model.safetensors"
    file.write_bytes(bytes(range(256)) * 100)
    refused(file.parent, "model.safetensors: not a readable safetensors file")


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**8 + 1, 10**6])
def test_a_header_of_absurd_length(hugging_face: Make, length: int) -> None:
    """Nothing of that size is allocated or read."""
    file = hugging_face("tiny_12b").write() / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(length.to_bytes(8, "little") + data[8:1000])
    refused(file.parent, "model.safetensors: not a readable safetensors file", f"{length:,} bytes")


def test_a_header_with_flipped_bits(hugging_face: Make) -> None:
    """One line, or the same arrays: a bit in white space or in a name of metadata changes nothing."""
    made = hugging_face("tiny_12b")
    file = made.write() / "model.safetensors"
    data = bytearray(file.read_bytes())
    end = 8 + int.from_bytes(data[:8], "little")
    rng = np.random.default_rng(0)
    for position in rng.integers(0, end, 60):
        spoilt = bytearray(data)
        spoilt[position] ^= 1 << int(rng.integers(0, 8))
        file.write_bytes(spoilt)
        try:
            _, parameters = read_parameters(file.parent)
        except InputError as error:
            message = str(error)
        else:
            message = ""
            assert parameters.keys() == made.parameters.keys()
        assert "\n" not in message


def test_a_file_that_shrinks_while_it_is_read(hugging_face: Make) -> None:
    directory = hugging_face("tiny_12b").write()
    with open_huggingface(directory) as source:
        os.truncate(directory / "model.safetensors", 10_000)
        with pytest.raises(InputError, match="bytes expected"):
            source.leaves[-1].read()


def test_wrong_number_types(hugging_face: Make) -> None:
    made = hugging_face("tiny_e2b")
    made.tensors[Q] = made.tensors[Q].astype(np.int8)
    refused(made.write(), Q, "stored as I8")


def test_another_vocabulary(hugging_face: Make) -> None:
    made = hugging_face("tiny_e2b")
    made.json["vocab_size"] = 65
    refused(made.write(), "embed_tokens.weight has shape [64, 128], [65, 128] expected")


def test_links_out_of_the_directory(hugging_face: Make, tmp_path: Path) -> None:
    """A link may lead into the blobs of a Hugging Face cache and nowhere else."""
    directory = hugging_face("tiny_12b").write()
    outside = tmp_path / "outside.safetensors"
    (directory / "model.safetensors").rename(outside)
    (directory / "model.safetensors").symlink_to(outside)
    refused(directory, "a link to", "outside the directory")
    snapshot, blobs = tmp_path / "snapshots" / "1234", tmp_path / "blobs"
    snapshot.parent.mkdir()
    blobs.mkdir()
    directory.rename(snapshot)
    outside.rename(blobs / "abcd")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to("../../blobs/abcd")
    read_parameters(snapshot)


def test_a_quantized_directory_is_not_floats(hugging_face: Make) -> None:
    """A `quantization_config` that names no method is what the -unquantized releases carry."""
    made = hugging_face("tiny_12b")
    made.json["quantization_config"] = {"bits": 4}
    read_parameters(made.write())
    made.json["quantization_config"] = {"quant_method": "gemma"}
    refused(made.write(), "quantized (quant_method gemma)")


def test_no_files_and_no_config(hugging_face: Make, tmp_path: Path) -> None:
    directory = hugging_face("tiny_12b").write()
    (directory / "model.safetensors").unlink()
    refused(directory, "no model.safetensors", kind=FileNotFoundError)
    (directory / "config.json").unlink()
    refused(directory, "config.json", kind=FileNotFoundError)
    refused(tmp_path / "nowhere", "config.json", kind=FileNotFoundError)


def test_index_names_a_missing_shard(hugging_face: Make) -> None:
    directory = hugging_face("tiny_12b").write(shards=2)
    (directory / "model-00002-of-00002.safetensors").unlink()
    refused(directory, "model-00002-of-00002", "the index names it", kind=FileNotFoundError)


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "", 5, ".."]
)
def test_index_escapes_the_directory(hugging_face: Make, name: Any) -> None:
    directory = hugging_face("tiny_12b").write(shards=2)
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    refused(directory, "index.json", "not a plain file name")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": ["b"]}}', "\xff"]
)
def test_index_that_is_none(hugging_face: Make, text: str) -> None:
    directory = hugging_face("tiny_12b").write(shards=2)
    (directory / "model.safetensors.index.json").write_bytes(text.encode("latin1"))
    refused(directory, "index.json: not a safetensors index")


@pytest.mark.parametrize("wrong", ["not there", "elsewhere", "not named"])
def test_an_index_that_is_not_of_these_shards(hugging_face: Make, wrong: str) -> None:
    """If it fails, shards of one checkpoint are read by the index of another."""
    directory = hugging_face("tiny_12b").write(shards=2)
    index = directory / "model.safetensors.index.json"
    where = json.loads(index.read_text())["weight_map"]
    here = where[Q]
    if wrong == "not there":
        where |= {"a": here, "b": here}
        parts = ("2 tensors", f"first a: {here} in the index, nowhere in the shards")
    elif wrong == "elsewhere":
        where[Q] = next(file for file in where.values() if file != here)
        parts = ("1 tensors", f"first {Q}: {where[Q]} in the index, {here} in the shards")
    else:
        del where[Q]
        parts = ("1 tensors", f"first {Q}: nowhere in the index, {here} in the shards")
    index.write_text(json.dumps({"weight_map": where}))
    refused(directory, "index.json", *parts)


def test_one_tensor_in_two_shards(hugging_face: Make) -> None:
    """Which of them would be read? Neither."""
    from safetensors.numpy import save_file

    made = hugging_face("tiny_12b")
    directory = made.write(shards=2)
    save_file(made.tensors, directory / "model-00002-of-00002.safetensors")
    refused(directory, "in two files")


def test_towers_dead_tensors_and_a_tied_head_are_no_obstacle(hugging_face: Make) -> None:
    made = hugging_face("tiny_e2b", prefix="model.language_model.")
    extra = {
        "model.vision_tower.patch.weight": (3, 3),
        "model.audio_tower.conv.weight": (2,),
        "model.embed_vision.projection.weight": (2, 2),
        "model.embed_audio.projection.weight": (2, 2),
        "model.language_model.layers.5.self_attn.k_proj.weight": (128, 128),
        "model.language_model.layers.4.self_attn.v_proj.weight": (64, 128),
        "model.language_model.layers.4.self_attn.k_norm.weight": (64,),
        "lm_head.weight": (64, 128),
    }
    made.tensors |= {name: np.zeros(shape, np.float32) for name, shape in extra.items()}
    _, parameters = read_parameters(made.write())
    assert parameters.keys() == made.parameters.keys()


def test_dead_tensors_of_layers_that_own_keys_are_not(hugging_face: Make) -> None:
    made = hugging_face("tiny_12b")
    made.tensors["model.layers.2.self_attn.v_proj.weight"] = np.zeros((64, 96), np.float32)
    refused(made.write(), "unexpected tensor model.layers.2.self_attn.v_proj.weight")


def test_an_untied_head_is_read_and_demanded(hugging_face: Make) -> None:
    made = hugging_face("tiny_12b")
    made.json["tie_word_embeddings"] = False
    refused(made.write(), "lm_head.weight is missing")
    made.tensors["lm_head.weight"] = np.full((64, 96), 3, np.float32)
    config, parameters = read_parameters(made.write())
    assert not config.ties_head
    assert (parameters["head/table"] == 3).all()


def test_a_checkpoint_of_something_else(hugging_face: Make) -> None:
    made = hugging_face("tiny_12b")
    made.tensors = {"transformer.h.0.weight": np.zeros(3, np.float32)}
    refused(made.write(), "no tensor starts with model.")
