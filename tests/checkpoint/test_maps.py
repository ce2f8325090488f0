"""Names and shapes of all sizes, there and back: if these fail, a released file is read into the wrong place."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from gemma_qat.checkpoint.huggingface import read_parameters
from gemma_qat.checkpoint.maps import foreign, is_dead
from gemma_qat.checkpoint.moves import contiguous
from gemma_qat.models import FULL_SIZES, SIZES, declare, parameter_count

TWINS = [name for name in SIZES if name.startswith("tiny_")]


@pytest.mark.parametrize("name", FULL_SIZES)
@pytest.mark.parametrize("ties", [True, False])
def test_every_parameter_has_one_place(name: str, ties: bool) -> None:
    """Names are used once, but for the two halves of a fused expert tensor; no element is lost or counted twice."""
    config = dataclasses.replace(SIZES[name], ties_head=ties)
    used: dict[str, list[str]] = {}
    shapes = {}
    for path, parameter in declare(config).items():
        there = foreign(parameter)
        used.setdefault(there.name, []).append(path.split("/", 2)[-1])
        assert shapes.setdefault(there.name, there.move.shape(parameter)) == there.move.shape(
            parameter
        )
    shared = {name: paths for name, paths in used.items() if len(paths) > 1}
    assert all(paths == ["experts/gate/kernel", "experts/up/kernel"] for paths in shared.values())
    assert len(shared) == (30 if "26b" in name else 0)
    assert sum(math.prod(shape) for shape in shapes.values()) == parameter_count(config)


@pytest.mark.parametrize("name", FULL_SIZES)
def test_moves_are_inverse_by_shape(name: str) -> None:
    """On arrays without memory (all strides 0), so that 31B costs nothing; one expert instead of 128."""
    for path, parameter in declare(SIZES[name]).items():
        if "/experts/" in path:
            parameter = dataclasses.replace(parameter, shape=(1, *parameter.shape[1:]))
        move = foreign(parameter).move
        theirs = np.broadcast_to(np.int8(0), move.shape(parameter))
        ours = move.read(theirs, parameter)
        assert ours.shape == parameter.shape, path
        parts = [ours] * move.parts
        assert move.write(parts, parameter).shape == theirs.shape, path


def test_known_tensors_of_the_released_files() -> None:
    """Written down from public checkpoints' indices."""
    wanted = {
        "e2b": {
            "embed_tokens_per_layer.weight": (262144, 8960),
            "per_layer_model_projection.weight": (8960, 1536),
            "layers.4.self_attn.q_proj.weight": (4096, 1536),
            "layers.4.self_attn.o_proj.weight": (1536, 4096),
            "layers.14.self_attn.k_proj.weight": (512, 1536),
            "layers.15.mlp.down_proj.weight": (1536, 12288),
            "layers.34.per_layer_input_gate.weight": (256, 1536),
        },
        "26b_a4b": {
            "layers.0.experts.gate_up_proj": (128, 1408, 2816),
            "layers.0.experts.down_proj": (128, 2816, 704),
            "layers.0.router.proj.weight": (128, 2816),
            "layers.5.self_attn.k_proj.weight": (1024, 2816),
            "layers.0.self_attn.v_proj.weight": (2048, 2816),
        },
    }
    for name, tensors in wanted.items():
        ours = {foreign(p).name: foreign(p).move.shape(p) for p in declare(SIZES[name]).values()}
        assert {tensor: ours[tensor] for tensor in tensors} == tensors
    shared = {foreign(p).name for p in declare(SIZES["e2b"]).values()}
    assert not any("layers.15.self_attn.k" in name for name in shared)


def test_fused_halves_by_hand() -> None:
    """Gate rows come before up rows, and each matrix is transposed."""
    parameters = declare(SIZES["tiny_26b_a4b"])
    gate, up = (parameters[f"layers/0/experts/{n}/kernel"] for n in ("gate", "up"))
    E, D, F = gate.shape
    x = np.arange(E * 2 * F * D, dtype=np.float32).reshape(E, 2 * F, D)
    assert foreign(gate).move.read(x, gate)[3, 5, 7] == x[3, 7, 5]
    assert foreign(up).move.read(x, up)[3, 5, 7] == x[3, F + 7, 5]


@pytest.mark.parametrize("axes", [(0, 1, 2), (1, 0, 2), (2, 1, 0), (0, 2, 1), (1, 2, 0), (2, 0, 1)])
def test_a_copy_in_blocks_is_a_copy(axes: tuple[int, ...], bfloat16: Any) -> None:
    """Longer than a block along some axes, of size 1 along others."""
    rng = np.random.default_rng(0)
    for shape in ((3, 5, 601), (601, 1, 7), (1, 530, 3), (0, 2, 3)):
        for dtype in (bfloat16, np.float32):
            x = rng.standard_normal(shape).astype(dtype).transpose(axes)
            found = contiguous(x)
            assert found.flags.c_contiguous and found.dtype == x.dtype
            np.testing.assert_array_equal(found, x)
    assert contiguous(np.array(3.0)).shape == ()


def test_heads_by_hand() -> None:
    """Row n * H + h of q_proj is head n, element h; column n * H + h of o_proj likewise."""
    parameters = declare(SIZES["tiny_31b"])
    q, o = (parameters[f"layers/0/attn/{n}/kernel"] for n in ("q", "o"))
    H = q.shape[2]
    x = np.random.default_rng(0).standard_normal(foreign(q).move.shape(q))
    assert foreign(q).move.read(x, q)[11, 2, 5] == x[2 * H + 5, 11]
    x = np.random.default_rng(0).standard_normal(foreign(o).move.shape(o))
    assert foreign(o).move.read(x, o)[2, 5, 11] == x[11, 2 * H + 5]


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize("shards", [1, 3])
def test_written_directories_read_back_equal(
    name: str, shards: int, hugging_face: Callable[..., Any], bfloat16: Any
) -> None:
    """Single file in float32, shards in bfloat16 under the multimodal prefix; dtype and bits stay."""
    options = {} if shards == 1 else {"dtype": bfloat16, "prefix": "model.language_model."}
    made = hugging_face(name, **options)
    config, parameters = read_parameters(made.write(shards))
    assert config == dataclasses.replace(made.config, name="hf")
    assert list(parameters) == list(declare(config))
    for path, want in made.parameters.items():
        assert parameters[path].dtype == want.dtype
        np.testing.assert_array_equal(parameters[path], want, err_msg=path)


def test_dead_tensors_are_those_of_sharing_layers_only() -> None:
    e2b = SIZES["e2b"]
    assert is_dead("layers.15.self_attn.k_proj.weight", e2b)
    assert is_dead("layers.34.self_attn.k_norm.weight", e2b)
    assert not is_dead("layers.14.self_attn.k_proj.weight", e2b)
    assert not is_dead("layers.35.self_attn.k_proj.weight", e2b)
    assert not is_dead("layers.15.self_attn.q_proj.weight", e2b)
    assert not is_dead("layers.47.self_attn.v_proj.weight", SIZES["12b"])
