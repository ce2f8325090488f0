"""Hugging Face directories of tiny twins, written here and not by the code that is tested, and how a spoilt one is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from gemma_qat.checkpoint.huggingface import read_parameters
from gemma_qat.checkpoint.maps import foreign
from gemma_qat.errors import InputError
from gemma_qat.models import SIZES, ModelConfig, declare


def shrunk(name: str) -> ModelConfig:
    """A tiny twin with a vocabulary of 64."""
    config = SIZES[name]
    return dataclasses.replace(
        config, vocab_size=64, per_layer_vocab=64 if config.per_layer_width else 0
    )


def config_json(config: ModelConfig) -> dict[str, Any]:
    """The text config of a released checkpoint, key by key."""
    kinds = {"sliding": "sliding_attention", "full": "full_attention"}
    rope = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        "full_attention": {
            "rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0
        },
    }  # fmt: skip
    experts = config.experts
    return {
        "model_type": "gemma4_text",
        "layer_types": [kinds[kind] for kind in config.layer_kinds],
        "num_hidden_layers": config.layers,
        "vocab_size": config.vocab_size,
        "vocab_size_per_layer_input": config.per_layer_vocab,
        "hidden_size": config.width,
        "hidden_size_per_layer_input": config.per_layer_width,
        "intermediate_size": config.ffn_width,
        "num_attention_heads": config.query_heads,
        "num_key_value_heads": config.kv_heads,
        "num_global_key_value_heads": config.global_kv_heads if config.key_equals_value else None,
        "head_dim": config.head_width,
        "global_head_dim": config.global_head_width,
        "attention_k_eq_v": config.key_equals_value,
        "sliding_window": config.window,
        "num_kv_shared_layers": config.shared_kv_layers,
        "use_double_wide_mlp": config.shared_ffn_width == 2 * config.ffn_width,
        "enable_moe_block": experts is not None,
        "num_experts": experts.count if experts else None,
        "top_k_experts": experts.per_token if experts else None,
        "moe_intermediate_size": experts.width if experts else None,
        "rope_parameters": rope,
        "final_logit_softcapping": 30.0,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": True,
    }


def random_parameters(config: ModelConfig, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {path: rng.standard_normal(p.shape).astype(dtype) for path, p in declare(config).items()}


def tensors_of(
    parameters: dict[str, np.ndarray], config: ModelConfig, prefix: str
) -> dict[str, np.ndarray]:
    """Foreign tensors by full name; arrays that share a tensor are handed over together."""
    parts: dict[str, list[str]] = {}
    declared = declare(config)
    for path, parameter in declared.items():
        parts.setdefault(foreign(parameter).name, []).append(path)
    out = {}
    for name, paths in parts.items():
        parameter = declared[paths[0]]
        whole = foreign(parameter).move.write([parameters[path] for path in paths], parameter)
        out[prefix + name] = np.ascontiguousarray(whole)
    return out


class Directory:
    """A Hugging Face directory whose tensors and config a test may spoil before it is written."""

    def __init__(self, path: Path, name: str, dtype: Any, prefix: str) -> None:
        self.path = path
        self.config = shrunk(name)
        self.parameters = random_parameters(self.config, dtype)
        self.tensors = tensors_of(self.parameters, self.config, prefix)
        self.json = config_json(self.config)

    def write(self, shards: int = 1) -> Path:
        self.path.mkdir(exist_ok=True)
        (self.path / "config.json").write_text(json.dumps(self.json))
        if shards == 1:
            save_file(self.tensors, self.path / "model.safetensors")
            return self.path
        names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
        where = {tensor: names[i % shards] for i, tensor in enumerate(self.tensors)}
        for file in names:
            part = {k: v for k, v in self.tensors.items() if where[k] == file}
            save_file(part, self.path / file)
        index = json.dumps({"metadata": {}, "weight_map": where})
        (self.path / "model.safetensors.index.json").write_text(index)
        return self.path


def refused(directory: Path, *parts: str, kind: type[Exception] = InputError) -> None:
    """Reading ends in one line that names all `parts`."""
    with pytest.raises(kind) as caught:
        read_parameters(directory)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


@pytest.fixture
def hugging_face(tmp_path: Path) -> Callable[..., Directory]:
    def make(name: str, dtype: Any = np.float32, prefix: str = "model.") -> Directory:
        return Directory(tmp_path / "hf", name, dtype, prefix)

    return make


@pytest.fixture
def bfloat16() -> Any:
    return ml_dtypes.bfloat16
