"""DeepMind's trees: if these fail, a released Orbax checkpoint is read into the wrong place or not at all."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from deepmind_tree import tensors_of, tree_of, write
from hf_directory import random_parameters

from gemma_qat.checkpoint.deepmind import open_deepmind
from gemma_qat.checkpoint.deepmind_map import places
from gemma_qat.checkpoint.source import UNUSED
from gemma_qat.errors import InputError
from gemma_qat.models import FULL_SIZES, SIZES, declare

STACKABLE = ("e4b", "12b", "26b_a4b", "31b")


def made(path: Path, name: str, layout: str = "nested", dtype: Any = np.float32) -> Any:
    """Writes a twin; returns its directory, its parameters and its tensors."""
    parameters = random_parameters(SIZES[name], dtype)
    tensors = tensors_of(parameters, SIZES[name], layout == "stacked")
    return write(path / "tree", tree_of(tensors, layout)), parameters, tensors


@pytest.mark.parametrize(
    ("name", "stacks"), [(n, False) for n in FULL_SIZES] + [(n, True) for n in STACKABLE]
)
def test_maps_there_and_back_by_shape(name: str, stacks: bool) -> None:
    """On arrays without memory; every array of ours has a place of its own, and every tensor is made of such places."""
    declared, found = declare(SIZES[name]), places(SIZES[name], stacks=stacks)
    assert list(found) == list(declared)
    taken: set[tuple[str, int]] = set()
    for path, place in found.items():
        parameter, move = declared[path], place.move
        theirs = np.broadcast_to(np.int8(0), move.shape(parameter))
        ours = move.read(theirs, parameter)
        assert ours.shape == parameter.shape, path
        assert math.prod(theirs.shape) == move.parts * parameter.size, path
        assert (place.name, move.part) not in taken and move.part < move.parts
        taken.add((place.name, move.part))
        if theirs.size < 1e7:
            assert move.write([ours] * move.parts, parameter).shape == theirs.shape, path


def test_known_arrays() -> None:
    """Written down from the public conversion script and the model's own modules."""
    wanted = {
        "e2b": {
            "embedder/per_layer_embeddings": (262144, 35, 256),
            "embedder/per_layer_model_projection": (1536, 35, 256),
            "layer_0/attn/q_einsum": (8, 1536, 256),
            "layer_4/attn/kv_einsum": (2, 1, 1536, 512),
            "layer_0/attn/attn_vec_einsum": (8, 256, 1536),
            "layer_15/mlp/gating_einsum": (2, 12288, 1536),
            "layer_0/mlp/linear": (6144, 1536),
            "layer_0/per_layer_input_gate": (1536, 256),
            "layer_0/per_layer_projection": (256, 1536),
        },
        "26b_a4b": {
            "layer_0/mlp/gating_einsum": (128, 2, 704, 2816),
            "layer_0/mlp/linear": (128, 704, 2816),
            "layer_0/mlp/router_logits": (2816, 128),
            "layer_0/mlp2/gating_einsum": (2, 2112, 2816),
            "layer_5/attn/k_einsum": (2, 2816, 512),
            "layer_0/attn/kv_einsum": (2, 8, 2816, 256),
        },
    }
    for name, arrays in wanted.items():
        declared, found = declare(SIZES[name]), places(SIZES[name])
        ours = {p.name: p.move.shape(declared[path]) for path, p in found.items()}
        assert {array: ours.get(array) for array in arrays} == arrays


def test_norms_of_experts_cross_over() -> None:
    """DeepMind's `mlp` are the experts, its `mlp2` is the dense branch."""
    found = places(SIZES["26b_a4b"])
    crossing = {
        "pre_ffn_norm": "pre_ffw2_norm", "post_dense_norm": "post_ffw2_norm", "pre_experts_norm": "pre_ffw_norm",
        "post_experts_norm": "post_ffw1_norm", "post_ffn_norm": "post_ffw_norm",
    }  # fmt: skip
    for ours, theirs in crossing.items():
        assert found[f"layers/3/{ours}/weight"].name == f"layer_3/{theirs}/scale"


def test_elements_by_hand() -> None:
    """Element (d, n, h) of a query is (n, d, h) there; gate comes before up; a stack counts repeats."""
    config = SIZES["tiny_26b_a4b"]
    declared = declare(config)
    rng = np.random.default_rng(0)
    q, up = (declared[f"layers/4/{n}/kernel"] for n in ("attn/q", "experts/up"))
    single, stack = places(config), places(config, stacks=True)
    x = rng.standard_normal(single[q.path].move.shape(q))
    assert single[q.path].move.read(x, q)[11, 2, 5] == x[2, 11, 5]
    x = rng.standard_normal(stack[up.path].move.shape(up))
    # Layer 4 of a period of 3: repeat 1 at position 1.
    assert stack[up.path].name == "stacked_layers/attention_type_1/mlp/gating_einsum"
    assert stack[up.path].move.read(x, up)[6, 11, 5] == x[1, 6, 1, 5, 11]


@pytest.mark.parametrize("name", ["e2b", "tiny_e2b"])
def test_layers_of_two_widths_are_no_stack(name: str) -> None:
    with pytest.raises(InputError, match="cannot be a stack"):
        places(SIZES[name], stacks=True)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("tiny_e2b", "nested"), ("tiny_e2b", "flat"), ("tiny_e4b", "stacked"), ("tiny_12b", "prefixed"),
        ("tiny_26b_a4b", "nested"), ("tiny_26b_a4b", "stacked"), ("tiny_31b", "flat"),
    ],
)  # fmt: skip
def test_trees_read_back_equal(name: str, layout: str, tmp_path: Path) -> None:
    """Which size it is follows from the arrays; bits and number type stay."""
    directory, parameters, _ = made(tmp_path, name, layout, ml_dtypes.bfloat16)
    with open_deepmind(directory) as source:
        assert source.config == SIZES[name] and source.left == {}
        read = {leaf.path: leaf.read() for leaf in source.leaves}
        assert sum(leaf.bytes for leaf in source.leaves) == sum(
            p.nbytes for p in parameters.values()
        )
    assert read.keys() == parameters.keys()
    for path, want in parameters.items():
        assert read[path].dtype == want.dtype
        np.testing.assert_array_equal(read[path], want, err_msg=path)


def test_a_kaggle_directory_and_what_is_left_out(tmp_path: Path) -> None:
    """The tree stands in a directory of its own beside the tokenizer; towers and unused keys are named."""
    parameters = random_parameters(SIZES["tiny_e2b"])
    tensors = tensors_of(parameters, SIZES["tiny_e2b"], False)
    tensors |= {
        "layer_5/attn/kv_einsum": np.zeros((2, 1, 128, 128), np.float32),
        "layer_5/attn/key_norm/scale": np.zeros(128, np.float32),
        "vision_encoder/entry/kernel": np.arange(6, dtype=np.float32),
        "embedder/audio_soft_embedding_norm/scale": np.zeros(3, np.float32),
    }
    write(tmp_path / "tiny-e2b-it", tree_of(tensors, "nested"))
    (tmp_path / "tokenizer.model").write_bytes(b"pieces")
    (tmp_path / "README.md").write_text("not carried")
    with open_deepmind(tmp_path) as source:
        assert source.left == {
            "layer_5/attn/kv_einsum": UNUSED,
            "layer_5/attn/key_norm/scale": UNUSED,
            "vision_encoder/entry/kernel": "vision",
            "embedder/audio_soft_embedding_norm/scale": "audio",
        }
        assert [path.name for path in source.beside] == ["tokenizer.model"]
        assert [leaf.path.split("/")[0] for leaf in source.carried] == [
            "embedder",
            "vision_encoder",
        ]
        np.testing.assert_array_equal(source.carried[1].read(), np.arange(6))


def refused(directory: Path, *parts: str) -> None:
    with pytest.raises(InputError) as caught, open_deepmind(directory) as source:
        for leaf in source.leaves:
            leaf.read()
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value), caught.value


def test_trees_that_are_not_whole(tmp_path: Path) -> None:
    parameters = random_parameters(SIZES["tiny_12b"])
    good = tensors_of(parameters, SIZES["tiny_12b"], False)
    missing = {k: v for k, v in good.items() if k != "layer_1/attn/q_einsum"}
    refused(
        write(tmp_path / "a", tree_of(missing, "nested")),
        "tiny_12b: layer_1/attn/q_einsum is missing",
    )
    shape = good | {"layer_1/mlp/linear": np.zeros((192, 95), np.float32)}
    refused(
        write(tmp_path / "b", tree_of(shape, "nested")), "has shape [192, 95], [192, 96] expected"
    )
    number = good | {"layer_1/mlp/linear": np.zeros((192, 96), np.int32)}
    refused(write(tmp_path / "c", tree_of(number, "nested")), "is stored as int32")
    extra = good | {"layer_1/mlp/lineal": np.zeros(3, np.float32)}
    refused(
        write(tmp_path / "d", tree_of(extra, "nested")),
        "unexpected array layer_1/mlp/lineal",
        "mlp/linear",
    )
    twice = tree_of(good, "nested") | tree_of(
        {"final_norm/scale": np.zeros(96, np.float32)}, "flat"
    )
    refused(write(tmp_path / "e", twice), "final_norm/scale is there twice")
    refused(tmp_path, "one Orbax tree expected, found: a, b, c, d, e")


@pytest.mark.parametrize("options", [{}, {"use_zarr3": True}], ids=["zarr", "zarr3"])
def test_chunks_larger_than_their_array(options: dict[str, bool], tmp_path: Path) -> None:
    """If it fails, 200 bytes of JSON have as much memory taken as they say, up to the end of the process."""
    tensors = tensors_of(random_parameters(SIZES["tiny_12b"]), SIZES["tiny_12b"], False)
    tree = write(tmp_path / "tree", tree_of(tensors, "nested"), use_ocdbt=False, **options)
    file = next((tree / "final_norm.scale").glob("*zarr*"))
    text = file.read_text()
    assert re.search(r'"chunk(s|_shape)": ?\[96\]', text)
    file.write_text(re.sub(r'("chunk(s|_shape)": ?)\[96\]', r"\1[960]", text))
    refused(tmp_path, "final_norm/scale of shape (96,) lies in chunks of (960,)")


def test_links(tmp_path: Path) -> None:
    """If it fails, a tree that was downloaded has files of ours read into it, or one that only lies elsewhere is refused."""
    directory, _, _ = made(tmp_path / "real", "tiny_12b")
    (tmp_path / "given").symlink_to(tmp_path / "real")
    (tmp_path / "straight").symlink_to(directory)
    cache = tmp_path / "snapshots" / "1" / "tree"
    shutil.copytree(directory, cache)
    data = next(path for path in cache.rglob("d/*") if path.stat().st_size > 1000)
    (tmp_path / "blobs").mkdir()
    shutil.move(data, tmp_path / "blobs" / "1234")
    data.symlink_to(tmp_path / "blobs" / "1234")
    for good in (tmp_path / "given", tmp_path / "straight", cache, cache.parent):
        with open_deepmind(good) as source:
            assert source.config == SIZES["tiny_12b"]
    outside = tmp_path / "moved"
    shutil.copytree(directory, tmp_path / "bad" / "tree")
    manifest = tmp_path / "bad" / "tree" / "manifest.ocdbt"
    manifest.rename(outside)
    manifest.symlink_to(outside)
    refused(tmp_path / "bad", f"{manifest}: a link to {outside}, outside the directory")
    manifest.unlink()
    manifest.symlink_to(manifest)
    refused(tmp_path / "bad", f"{manifest}: neither a file nor a directory")
    manifest.unlink()
    os.mkfifo(manifest)  # opened, it would be waited for
    refused(tmp_path / "bad", f"{manifest}: neither a file nor a directory")
    manifest.unlink()
    shutil.copy(outside, manifest)
    whole = tmp_path / "bad" / "tree" / "ocdbt.process_0"
    whole.rename(tmp_path / "bad" / "database")
    whole.symlink_to(tmp_path / "bad" / "database")
    refused(tmp_path / "bad", f"{whole}: a link to a directory")
    shutil.rmtree(tmp_path / "bad")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "tree").symlink_to(directory)
    refused(tmp_path / "bad", f"tree: a link to {directory}, outside the directory; give that one")


def test_names_that_lead_elsewhere(tmp_path: Path) -> None:
    """If it fails, a tree is made of arrays that lie outside of it, or a terminal is sent what it obeys.

    TensorStore 0.1.86 refuses `..` itself, and reads what stands at an absolute path.
    """
    tensors = tensors_of(random_parameters(SIZES["tiny_12b"]), SIZES["tiny_12b"], False)
    other, tree = (
        write(tmp_path / name, tree_of(tensors, "nested"), use_ocdbt=False) for name in "ab"
    )
    (tree / "final_norm.scale").rename(tree / "final\x07norm.scale")
    text = (tree / "_METADATA").read_text()
    for name, said in (
        ("../a/final_norm", "not an Orbax tree"),
        (f"{other}/final_norm", "is no name of an array"),
        ("final\x07norm", r"'final\x07norm.scale' is no name of an array"),
    ):
        (tree / "_METADATA").write_text(text.replace("final_norm", json.dumps(name)[1:-1]))
        refused(tree, str(tree), said)


# When one array cannot be read, Orbax leaves others to end after the loop that waited for them all.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_trees_that_are_damaged(tmp_path: Path) -> None:
    """Every kind of file of the tree, cut short or overwritten."""
    directory, _, _ = made(tmp_path, "tiny_12b")
    for file in ("_METADATA", "manifest.ocdbt", "ocdbt.process_0/manifest.ocdbt"):
        path = directory / file
        kept = path.read_bytes()
        for data in (b"", kept[: len(kept) // 2], bytes(255 - byte for byte in kept)):
            path.write_bytes(data)
            if file.startswith("ocdbt"):
                continue  # read through the merged manifest beside it, or not at all
            refused(directory)
        path.write_bytes(kept)
    data = max((p for p in directory.rglob("d/*") if p.is_file()), key=lambda p: p.stat().st_size)
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    refused(directory, "cannot be read")
