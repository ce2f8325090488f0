"""A `ModelConfig` as the `config.json` of a text-only Hugging Face directory, with the keys of the released files.

`model_type` is gemma4_text for every size: the unified classes of the 12B compute the same from the same arrays, and
every program that reads a text-only Gemma 4 knows this one. Keys are those of the released files (`global_head_dim`,
`num_global_key_value_heads`), not the `per_layer_config` of recent transformers, which reads both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma_qat.checkpoint.hf_config import config_from_dict, read_json
from gemma_qat.errors import InputError
from gemma_qat.models.config import ModelConfig

TORCH_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def config_json(config: ModelConfig, dtype: str = "F32") -> dict[str, Any]:
    """Returns the config of a text-only directory whose float arrays are `dtype` (F32, BF16).

    Raises: InputError when those keys cannot say what the model is.
    """
    raw = _keys(config) | {"dtype": TORCH_DTYPES[dtype]}
    read = config_from_dict(raw, config.name)
    for field in dataclasses.fields(ModelConfig):
        mine, found = getattr(config, field.name), getattr(read, field.name)
        if mine != found and not _same_width(config, field.name):
            raise InputError(
                f"{config.name}: {field.name} = {mine} has no place in a Gemma 4 config.json, it reads as {found}"
            )
    return raw


def beside_towers(decoder: Mapping[str, Any], original: Path) -> dict[str, Any]:
    """Returns the config of a directory with towers: that of the checkpoint they came from, with this decoder in it.

    Raises: InputError when it is not the config of a model with several parts.
    """
    raw = read_json(original)
    text = raw.get("text_config")
    if not isinstance(text, dict):
        raise InputError(f"{original}: a text_config expected beside towers of vision and audio")
    own = {key: value for key, value in decoder.items() if key != "architectures"}
    own["model_type"] = text.get("model_type", own["model_type"])
    merged = {key: value for key, value in raw.items() if key != "quantization_config"}
    return merged | {"text_config": own, "dtype": decoder["dtype"]}


def _same_width(config: ModelConfig, name: str) -> bool:
    """Whether a KV-sharing layer's own width is written out though it is everybody's."""
    return name == "shared_ffn_width" and config.shared_ffn_width in (0, config.ffn_width)


def _keys(config: ModelConfig) -> dict[str, Any]:
    experts = config.experts
    ropes = {"sliding_attention": config.local_rope, "full_attention": config.global_rope}
    return {
        "architectures": ["Gemma4ForCausalLM"],
        "model_type": "gemma4_text",
        "vocab_size": config.vocab_size,
        "vocab_size_per_layer_input": config.per_layer_vocab,
        "hidden_size": config.width,
        "hidden_size_per_layer_input": config.per_layer_width,
        "intermediate_size": config.ffn_width,
        "use_double_wide_mlp": config.shared_ffn_width == 2 * config.ffn_width,
        "num_hidden_layers": config.layers,
        "layer_types": [f"{kind}_attention" for kind in config.layer_kinds],
        "num_attention_heads": config.query_heads,
        "num_key_value_heads": config.kv_heads,
        "num_global_key_value_heads": config.global_kv_heads if config.key_equals_value else None,
        "head_dim": config.head_width,
        "global_head_dim": config.global_head_width,
        "attention_k_eq_v": config.key_equals_value,
        "num_kv_shared_layers": config.shared_kv_layers,
        "sliding_window": config.window,
        "rope_parameters": {
            name: _rope(rope.theta, rope.fraction, name == "full_attention")
            for name, rope in ropes.items()
        },
        "enable_moe_block": experts is not None,
        "num_experts": experts.count if experts else None,
        "top_k_experts": experts.per_token if experts else None,
        "moe_intermediate_size": experts.width if experts else None,
        "final_logit_softcapping": config.logit_softcap,
        "rms_norm_eps": config.eps,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.ties_head,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_bidirectional_attention": None,
        "use_cache": True,
        "initializer_range": 0.02,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }


def _rope(theta: float, fraction: float, proportional: bool) -> dict[str, Any]:
    if proportional:
        return {
            "rope_type": "proportional", "partial_rotary_factor": fraction, "rope_theta": theta
        }  # fmt: skip
    return {"rope_type": "default", "rope_theta": theta}
