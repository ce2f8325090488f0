"""A Hugging Face `config.json` of Gemma 4, in every dialect that exists, as a `ModelConfig`.

| dialect | what differs |
|---|---|
| released, multimodal | the decoder under `text_config`; flat `global_head_dim`, `num_global_key_value_heads` |
| text-only | the same keys at the top level |
| written by recent transformers | no `global_*` keys but `per_layer_config`: {"05": {"head_dim": ...}} |
| unified (12B) | `model_type` gemma4_unified_text: no per-layer inputs and no experts whatever other keys say |

`num_global_key_value_heads` counts only with `attention_k_eq_v`; null means the same as on local layers. Keys
whose class default differs from every released file (soft cap, per-layer width) are required rather than
guessed. Keys that would make another model than the one that is computed here (another activation, biases of attention)
are refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma_qat.errors import InputError, unknown
from gemma_qat.models.config import ModelConfig
from gemma_qat.nn.rope import Rope
from gemma_qat.nn.shapes import ExpertsShape
from gemma_qat.quant.sites import LayerKind

_KINDS: dict[str, LayerKind] = {"sliding_attention": "sliding", "full_attention": "full"}
_TEXT_TYPES = ("gemma4_text", "gemma4_unified_text")
_ACTIVATION = "gelu_pytorch_tanh"
_DEFAULTS = {
    "num_kv_shared_layers": 0, "rms_norm_eps": 1e-6, "max_position_embeddings": 131_072
}  # fmt: skip


def read_config(path: Path) -> ModelConfig:
    """Returns the decoder described by the `config.json` at `path`.

    Raises: FileNotFoundError; InputError naming the file and the key for anything unreadable, missing or contradictory.
    """
    raw = read_json(path)
    try:
        return config_from_dict(raw, name=path.parent.name)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: missing or malformed key {error}") from None
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file of a Hugging Face directory.

    Raises: FileNotFoundError; InputError when it is not JSON, or not an object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a Hugging Face directory has a config.json")
    try:
        raw = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error})") from None
    if not isinstance(raw, dict):
        raise InputError(f"{path}: a JSON object expected, {type(raw).__name__} given")
    return raw


def quantization_method(directory: Path) -> str | None:
    """Returns the `quant_method` of a directory's `config.json` (gemma, compressed-tensors); None for floats.

    A `quantization_config` without one is what the `-unquantized` releases carry: floats.
    Raises: FileNotFoundError; InputError when the file is not JSON.
    """
    found = read_json(directory / "config.json").get("quantization_config")
    method = found.get("quant_method") if isinstance(found, dict) else None
    return None if method is None else str(method)


def config_from_dict(raw: dict[str, Any], name: str = "model") -> ModelConfig:
    """Returns the decoder described by a parsed config, nested or flat.

    Raises: KeyError for a missing key; InputError or ValueError for values that contradict one another.
    """
    ties = raw.get("tie_word_embeddings", True)
    text = _DEFAULTS | (raw.get("text_config") or raw)
    if text["model_type"] not in _TEXT_TYPES:
        raise unknown("model_type", str(text["model_type"]), _TEXT_TYPES)
    _refuse_another_model(text)
    unified = text["model_type"] == "gemma4_unified_text"
    kinds = tuple(_kind(value) for value in text["layer_types"])
    if len(kinds) != text["num_hidden_layers"]:
        raise InputError(
            f"layer_types lists {len(kinds)} layers, num_hidden_layers says {text['num_hidden_layers']}"
        )
    heads, kv_heads, global_heads, global_kv_heads = _head_sizes(text, kinds)
    ffn = _count(text, "intermediate_size")
    per_layer = 0 if unified else _count_or_0(text, "hidden_size_per_layer_input")
    double = bool(text.get("use_double_wide_mlp")) and not unified
    ropes, softcap = text["rope_parameters"], text["final_logit_softcapping"]
    return ModelConfig(
        name=name,
        layer_kinds=kinds,
        vocab_size=_count(text, "vocab_size"),
        width=_count(text, "hidden_size"),
        query_heads=_count(text, "num_attention_heads"),
        kv_heads=kv_heads,
        global_kv_heads=global_kv_heads,
        head_width=heads,
        global_head_width=global_heads,
        ffn_width=ffn,
        shared_ffn_width=2 * ffn if double else 0,
        window=_count(text, "sliding_window"),
        shared_kv_layers=0 if unified else _count_or_0(text, "num_kv_shared_layers"),
        key_equals_value=bool(text.get("attention_k_eq_v")),
        per_layer_width=per_layer,
        per_layer_vocab=_count(text, "vocab_size_per_layer_input") if per_layer else 0,
        experts=None if unified else _experts(text),
        local_rope=_rope(ropes["sliding_attention"]),
        global_rope=_rope(ropes["full_attention"]),
        logit_softcap=softcap if softcap is None else _positive(text, "final_logit_softcapping"),
        eps=_positive(text, "rms_norm_eps"),
        max_positions=_count(text, "max_position_embeddings"),
        ties_head=bool(text.get("tie_word_embeddings", ties)),
    )


def _refuse_another_model(text: Mapping[str, Any]) -> None:
    for key in ("hidden_activation", "hidden_act"):
        if text.get(key, _ACTIVATION) != _ACTIVATION:
            raise InputError(f"{key} is {text[key]!r}, {_ACTIVATION!r} expected")
    if text.get("attention_bias"):
        raise InputError(f"attention_bias is {text['attention_bias']!r}, false expected")


def _count(raw: Mapping[str, Any], key: str) -> int:
    value = raw[key]
    if not isinstance(value, int) or isinstance(value, bool):
        raise InputError(f"{key} is {value!r}, a whole number expected")
    return value


def _count_or_0(raw: Mapping[str, Any], key: str) -> int:
    """A count where null says that there is none."""
    return 0 if raw[key] is None else _count(raw, key)


def _positive(raw: Mapping[str, Any], key: str) -> float:
    value = raw[key]
    known = isinstance(value, int | float) and not isinstance(value, bool)
    if not known or not math.isfinite(value) or value <= 0:
        raise InputError(f"{key} is {value!r}, a finite number above 0 expected")
    return float(value)


def _kind(value: str) -> LayerKind:
    if value not in _KINDS:
        raise unknown("layer type", str(value), _KINDS)
    return _KINDS[value]


def _rope(raw: dict[str, Any]) -> Rope:
    fraction = (
        raw.get("partial_rotary_factor", 1.0) if raw.get("rope_type") == "proportional" else 1.0
    )
    return Rope(theta=_positive(raw, "rope_theta"), fraction=float(fraction))


def _experts(text: dict[str, Any]) -> ExpertsShape | None:
    if not text.get("enable_moe_block"):
        return None
    return ExpertsShape(
        count=_count(text, "num_experts"),
        per_token=_count(text, "top_k_experts"),
        width=_count(text, "moe_intermediate_size"),
    )


def _head_sizes(text: dict[str, Any], kinds: tuple[LayerKind, ...]) -> tuple[int, int, int, int]:
    """Returns (local head width, local KV heads, global head width, global KV heads)."""
    width, heads = _count(text, "head_dim"), _count(text, "num_key_value_heads")
    overrides = text.get("per_layer_config")
    if overrides is None:
        own = text.get("num_global_key_value_heads") if text.get("attention_k_eq_v") else None
        wide_heads = _count(text, "num_global_key_value_heads") if own else heads
        return width, heads, _count(text, "global_head_dim"), wide_heads
    by_layer = {int(index): layer for index, layer in overrides.items()}  # "5", or padded: "05"
    found: dict[str, set[tuple[int, int]]] = {"sliding": set(), "full": set()}
    for index, kind in enumerate(kinds):
        layer = {"head_dim": width, "num_key_value_heads": heads} | by_layer.get(index, {})
        found[kind].add((_count(layer, "head_dim"), _count(layer, "num_key_value_heads")))
    for name, sizes in found.items():
        if len(sizes) > 1:
            raise InputError(
                f"per_layer_config gives {name} layers different heads: {sorted(sizes)}"
            )
    local = next(iter(found["sliding"]), (width, heads))
    wide = next(iter(found["full"]), local)
    return (*local, *wide)
