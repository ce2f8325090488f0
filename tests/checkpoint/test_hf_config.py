"""Configs of Hugging Face directories: every dialect is one decoder, and what contradicts itself is refused in one line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hf_directory import refused

from gemma_qat.checkpoint.hf_config import config_from_dict, read_config
from gemma_qat.errors import InputError

Make = Callable[..., Any]


def test_config_that_is_no_json(hugging_face: Make) -> None:
    directory = hugging_face("tiny_12b").write()
    for data in (b"", b"{", b"\xff\xfe", b"[1]", b"3"):
        (directory / "config.json").write_bytes(data)
        refused(directory, "config.json: ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_types": ["sliding_attention"] * 5 + ["full_atention"]}, "nearest: full_attention"),
        (
            {"layer_types": ["full_attention"]},
            "layer_types lists 1 layers, num_hidden_layers says 6",
        ),
        ({"layer_types": None}, "config.json"),
        ({"model_type": "gemma3_text"}, "unknown model_type 'gemma3_text'"),
        ({"head_dim": None}, "config.json"),
        ({"num_attention_heads": 3}, "3 query heads cannot share"),
        ({"num_key_value_heads": 0}, "kv_heads is 0, at least 1"),
        ({"hidden_size": -96}, "width is -96"),
        ({"hidden_size": "wide"}, "hidden_size is 'wide', a whole number expected"),
        ({"hidden_size": "96"}, "hidden_size is '96', a whole number expected"),
        (
            {"hidden_activation": "relu"},
            "hidden_activation is 'relu', 'gelu_pytorch_tanh' expected",
        ),
        ({"hidden_act": "silu"}, "hidden_act is 'silu', 'gelu_pytorch_tanh' expected"),
        ({"attention_bias": True}, "attention_bias is True, false expected"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps is nan, a finite number above 0 expected"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0, a finite number above 0 expected"),
        ({"final_logit_softcapping": 0.0}, "final_logit_softcapping is 0.0, a finite number"),
        ({"final_logit_softcapping": -30.0}, "final_logit_softcapping is -30.0, a finite number"),
        ({"final_logit_softcapping": math.inf}, "final_logit_softcapping is inf, a finite number"),
        ({"rope_parameters": {}}, "sliding_attention"),
        ({"num_kv_shared_layers": 6}, "6 KV-sharing layers of 6"),
        ({"text_config": [1]}, "config.json"),
    ],
    ids=str,
)
def test_configs_that_contradict_themselves(
    hugging_face: Make, change: dict[str, Any], message: str
) -> None:
    made = hugging_face("tiny_12b")
    made.json |= change
    refused(made.write(), "config.json", message)


@pytest.mark.parametrize(
    "key",
    [
        "model_type",
        "layer_types",
        "hidden_size",
        "final_logit_softcapping",
        "rope_parameters",
        "head_dim",
    ],
)
def test_required_keys(hugging_face: Make, key: str) -> None:
    made = hugging_face("tiny_e2b")
    del made.json[key]
    refused(made.write(), "config.json: missing or malformed key", key)


def test_a_model_may_have_no_soft_cap(hugging_face: Make) -> None:
    """If it fails, null is taken for a bad number."""
    made = hugging_face("tiny_12b")
    made.json |= {"final_logit_softcapping": None, "hidden_activation": "gelu_pytorch_tanh"}
    made.json |= {"attention_bias": False}
    assert config_from_dict(made.json).logit_softcap is None


@pytest.mark.parametrize("name", ["tiny_e2b", "tiny_12b", "tiny_26b_a4b"])
def test_dialects(hugging_face: Make, name: str) -> None:
    """Nested and flat, and heads of global layers given by layer, are the same decoder."""
    made = hugging_face(name)
    config = config_from_dict(made.json)
    assert config_from_dict({"model_type": "gemma4", "text_config": made.json}) == config
    by_layer = {k: v for k, v in made.json.items() if "global" not in k}
    wide = {"head_dim": config.global_head_width, "num_key_value_heads": config.global_kv_heads}
    for width in (1, 2):
        by_layer["per_layer_config"] = {
            f"{i:0{width}}": wide for i, kind in enumerate(config.layer_kinds) if kind == "full"
        }
        assert config_from_dict(by_layer) == config
    uneven = by_layer | {"per_layer_config": {"1": {"head_dim": 8}, "0": {"head_dim": 16}}}
    with pytest.raises(InputError, match="different heads"):
        config_from_dict(uneven)


def test_unified_configs_have_no_extras(hugging_face: Make, tmp_path: Path) -> None:
    """12B: keys of per-layer inputs and experts are there and mean nothing."""
    made = hugging_face("tiny_12b")
    plain = config_from_dict(made.json)
    noise = {"hidden_size_per_layer_input": 32, "num_kv_shared_layers": 2, "enable_moe_block": True}
    made.json |= noise | {"model_type": "gemma4_unified_text"}
    assert config_from_dict(made.json) == plain
    (tmp_path / "config.json").write_text(json.dumps(made.json))
    assert read_config(tmp_path / "config.json").layers == 6
