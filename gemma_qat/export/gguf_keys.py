"""A Gemma 4 config as GGUF key/values, there and back.

Arrays over layers stand where layers differ and a single number where they do not. `key_length`
speaks of global layers and `key_length_swa` of sliding ones. Global layers rotate only a quarter of
each head: the file says that all of it rotates and gives a tensor of divisors, 1 for the pairs that
do and 1e30 (no rotation left) for those that do not.

Source: `Gemma4Model.set_gguf_parameters` in ggml-org/llama.cpp (conversion/gemma.py),
`src/models/gemma4.cpp`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from gemma_qat.errors import InputError
from gemma_qat.export.gguf_vocab import KeyValues
from gemma_qat.models.config import ModelConfig
from gemma_qat.nn.rope import Rope
from gemma_qat.nn.shapes import ExpertsShape
from gemma_qat.quant.sites import LayerKind

ARCHITECTURE = "gemma4"

_STILL = np.float32(1e30)


def config_keys(config: ModelConfig) -> KeyValues:
    """Returns the key/values of a decoder, all but `general.*` and the vocabulary's."""
    shapes = config.layer_shapes()
    local, whole = config.head_width, config.global_head_width
    keys: KeyValues = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_positions,
        "embedding_length": config.width,
        "embedding_length_per_layer_input": config.per_layer_width,
        "block_count": config.layers,
        "feed_forward_length": _per_layer([shape.ffn_width for shape in shapes]),
        "attention.head_count": config.query_heads,
        "attention.head_count_kv": _per_layer([shape.kv_heads for shape in shapes]),
        "attention.layer_norm_rms_epsilon": float(config.eps),
        "attention.key_length": whole,
        "attention.value_length": whole,
        "attention.key_length_swa": local,
        "attention.value_length_swa": local,
        "attention.sliding_window": config.window,
        "attention.sliding_window_pattern": [kind == "sliding" for kind in config.layer_kinds],
        "attention.shared_kv_layers": config.shared_kv_layers,
        "rope.freq_base": float(config.global_rope.theta),
        "rope.freq_base_swa": float(config.local_rope.theta),
        "rope.dimension_count": whole,
        "rope.dimension_count_swa": local,
        # Left out it would mean 30; zero means none.
        "final_logit_softcapping": float(config.logit_softcap or 0),
    }
    if config.experts is not None:
        keys["expert_count"] = config.experts.count
        keys["expert_used_count"] = config.experts.per_token
        keys["expert_feed_forward_length"] = config.experts.width
    return {f"{ARCHITECTURE}.{name}": value for name, value in keys.items()}


def rope_factors(config: ModelConfig) -> Float[np.ndarray, "..."]:
    """Returns what the rotary frequencies of global layers are divided by, float32, one a pair."""
    pairs = config.global_head_width // 2
    rotating = int(config.global_rope.fraction * config.global_head_width // 2)
    return np.where(np.arange(pairs) < rotating, np.float32(1), _STILL)


def refuse_config(config: ModelConfig) -> None:
    """Refuses what the format has no words for and what llama.cpp would not run.

    Raises: InputError in one line.
    """
    if config.local_rope.fraction != 1.0:
        fraction = config.local_rope.fraction
        raise InputError(
            f"{config.name}: sliding layers that rotate {fraction} of a head; GGUF carries 1.0"
        )
    if config.per_layer_width and config.per_layer_vocab != config.vocab_size:
        raise InputError(
            f"{config.name}: a per-layer table of {config.per_layer_vocab} rows given, "
            f"GGUF carries as many as the vocabulary has, {config.vocab_size}"
        )
    _refuse_kv_sources(config)


def _refuse_kv_sources(config: ModelConfig) -> None:
    # llama.cpp takes shared keys and values from fixed places; elsewhere it ends the process.
    first = config.layers - config.shared_kv_layers
    for kind, back in (("full", 1), ("sliding", 2)):
        if kind not in config.layer_kinds[first:]:
            continue
        owners = [i for i in range(first) if config.layer_kinds[i] == kind]
        if not owners or owners[-1] != first - back:
            found = f"layer {owners[-1]}" if owners else "no layer"
            raise InputError(
                f"{config.name}: {kind} KV-sharing layers read {found}, llama.cpp lets them read "
                f"layer {first - back}: the last layer with keys and values of its own must be "
                "full, the one before it sliding"
            )


def config_of(
    keys: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], factors: Any
) -> ModelConfig:
    """Returns the config that a file's key/values, tensor shapes and rotary divisors describe.

    Raises: InputError naming a key that is missing, or when the divisors are not of the form 1 ...
        1 1e30 ... 1e30.
    """
    read = _Keys(keys)
    kinds: tuple[LayerKind, ...] = tuple(
        "sliding" if sliding else "full" for sliding in read["attention.sliding_window_pattern"]
    )
    widths = _spread(read["feed_forward_length"], len(kinds))
    heads = dict(zip(kinds, _spread(read["attention.head_count_kv"], len(kinds)), strict=True))
    shared = int(read["attention.shared_kv_layers"])
    owned_full = [i for i in range(len(kinds) - shared) if kinds[i] == "full"]
    config = ModelConfig(
        name=str(keys.get("general.name", ARCHITECTURE)),
        layer_kinds=kinds,
        vocab_size=shapes["token_embd.weight"][0],
        width=read["embedding_length"],
        query_heads=read["attention.head_count"],
        kv_heads=heads.get("sliding", heads[kinds[-1]]),
        global_kv_heads=heads.get("full", heads[kinds[-1]]),
        head_width=read["attention.key_length_swa"],
        global_head_width=read["attention.key_length"],
        ffn_width=widths[0],
        shared_ffn_width=widths[-1] if widths[-1] != widths[0] else 0,
        window=read["attention.sliding_window"],
        shared_kv_layers=shared,
        key_equals_value=any(f"blk.{i}.attn_v.weight" not in shapes for i in owned_full),
        per_layer_width=read["embedding_length_per_layer_input"],
        per_layer_vocab=shapes.get("per_layer_token_embd.weight", (0,))[0],
        experts=_experts(read),
        local_rope=Rope(theta=read["rope.freq_base_swa"]),
        global_rope=Rope(theta=read["rope.freq_base"], fraction=_fraction(factors)),
        logit_softcap=read["final_logit_softcapping"] or None,
        eps=read["attention.layer_norm_rms_epsilon"],
        max_positions=read["context_length"],
        ties_head="output.weight" not in shapes,
    )
    if factors is not None and not np.array_equal(factors, rope_factors(config)):
        raise InputError("rope_freqs.weight: neither 1 nor 1e30 everywhere, or not in this order")
    return config


def _per_layer(values: list[int]) -> int | list[int]:
    return values if len(set(values)) > 1 else values[0]


def _spread(value: int | list[int], layers: int) -> list[int]:
    return value if isinstance(value, list) else [value] * layers


def _experts(read: _Keys) -> ExpertsShape | None:
    if "expert_count" not in read:
        return None
    return ExpertsShape(
        count=read["expert_count"],
        per_token=read["expert_used_count"],
        width=read["expert_feed_forward_length"],
    )


def _fraction(factors: Any) -> float:
    return 1.0 if factors is None else float(np.sum(factors == 1)) / len(factors)


class _Keys:
    """The architecture's key/values by their short names."""

    def __init__(self, keys: Mapping[str, Any]) -> None:
        self._keys = keys

    def __contains__(self, name: str) -> bool:
        return f"{ARCHITECTURE}.{name}" in self._keys

    def __getitem__(self, name: str) -> Any:
        if name not in self:
            raise InputError(f"key {ARCHITECTURE}.{name}: missing")
        return self._keys[f"{ARCHITECTURE}.{name}"]
