"""A Gemma 4 config as GGUF key/values, there and back.

Arrays over layers stand where layers differ and a single number where they do not. `key_length`
speaks of global layers and `key_length_swa` of sliding ones. Global layers rotate only a quarter of
each head: the file says that all of it rotates and gives a tensor of divisors, 1 for the pairs that
do and 1e30 (no rotation left) for those that do not.

Source: `Gemma4Model.set_gguf_parameters` in ggml-org/llama.cpp (conversion/gemma.py),
`src/models/gemma4.cpp`.
"""

from __future__ import annotations

import math
import re
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

RECIPE_KEY = "gemma_qat.recipe"
"""Ours, ignored by others: the recipe whose codes a file holds."""
WEIGHTS_ONLY_KEY = "gemma_qat.weights_only"
"""Ours: whether training rounded more than the file can say (static scales of activations, keys and values)."""
ROUNDED_KEY = "gemma_qat.rounded_scales"
"""Ours: how many scales of the checkpoint were no float16 and were rounded to one."""

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
    if first < 2 or "sliding" not in config.layer_kinds:
        raise InputError(
            f"{config.name}: {first} layers with keys and values of their own, "
            f"{config.layer_kinds.count('sliding')} sliding; llama.cpp needs at least two of the one, one of the other"
        )
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
        "sliding" if sliding else "full"
        for sliding in read.flags("attention.sliding_window_pattern")
    )
    widths = _spread(read.integers("feed_forward_length"), len(kinds))
    spread = _spread(read.integers("attention.head_count_kv"), len(kinds))
    heads = dict(zip(kinds, spread, strict=True))
    if any(heads[kind] != count for kind, count in zip(kinds, spread, strict=True)):
        raise InputError("key attention.head_count_kv: it differs among layers of one kind")
    shared = read.integer("attention.shared_kv_layers", 0)
    owned_full = [i for i in range(len(kinds) - shared) if kinds[i] == "full"]
    config = ModelConfig(
        name=_plain(keys.get("general.name")),
        layer_kinds=kinds,
        vocab_size=shapes["token_embd.weight"][0],
        width=read.integer("embedding_length"),
        query_heads=read.integer("attention.head_count"),
        kv_heads=heads.get("sliding", heads[kinds[-1]]),
        global_kv_heads=heads.get("full", heads[kinds[-1]]),
        head_width=read.integer("attention.key_length_swa"),
        global_head_width=read.integer("attention.key_length"),
        ffn_width=widths[0],
        shared_ffn_width=widths[-1] if widths[-1] != widths[0] else 0,
        window=read.integer("attention.sliding_window"),
        shared_kv_layers=shared,
        key_equals_value=any(f"blk.{i}.attn_v.weight" not in shapes for i in owned_full),
        per_layer_width=read.integer("embedding_length_per_layer_input"),
        per_layer_vocab=shapes.get("per_layer_token_embd.weight", (0,))[0],
        experts=_experts(read),
        local_rope=Rope(theta=read.number("rope.freq_base_swa")),
        global_rope=Rope(theta=read.number("rope.freq_base"), fraction=_fraction(factors)),
        logit_softcap=read.number("final_logit_softcapping", 30.0) or None,
        eps=read.number("attention.layer_norm_rms_epsilon"),
        max_positions=read.integer("context_length"),
        ties_head="output.weight" not in shapes,
    )
    fits = factors is None or 2 * len(factors) == config.global_head_width
    if factors is not None and not (fits and np.array_equal(factors, rope_factors(config))):
        raise InputError("rope_freqs.weight: neither 1 nor 1e30 everywhere, or not in this order")
    return config


def _plain(name: Any) -> str:
    """A model's name that is safe to make a file's name of."""
    text = name if isinstance(name, str) else ""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", text).lstrip(".")[:64] or ARCHITECTURE


def _per_layer(values: list[int]) -> int | list[int]:
    return values if len(set(values)) > 1 else values[0]


def _spread(values: list[int], layers: int) -> list[int]:
    return values * layers if len(values) == 1 else values


def _experts(read: _Keys) -> ExpertsShape | None:
    if "expert_count" not in read:
        return None
    return ExpertsShape(
        count=read.integer("expert_count"),
        per_token=read.integer("expert_used_count"),
        width=read.integers("expert_feed_forward_length")[0],
    )


def _fraction(factors: Any) -> float:
    return 1.0 if factors is None else float(np.sum(factors == 1)) / len(factors)


class _Keys:
    """The architecture's key/values by their short names."""

    def __init__(self, keys: Mapping[str, Any]) -> None:
        self._keys = keys

    def __contains__(self, name: str) -> bool:
        return f"{ARCHITECTURE}.{name}" in self._keys

    def _get(self, name: str) -> Any:
        if name not in self:
            raise InputError(f"key {ARCHITECTURE}.{name}: missing")
        return self._keys[f"{ARCHITECTURE}.{name}"]

    def integer(self, name: str, default: int | None = None) -> int:
        """Returns a count."""
        if default is not None and name not in self:
            return default
        return self._checked(name, [self._get(name)], int)[0]

    def integers(self, name: str) -> list[int]:
        """Returns one count a layer, or one for all."""
        value = self._get(name)
        return self._checked(name, value if isinstance(value, list) else [value], int)

    def flags(self, name: str) -> list[bool]:
        """Returns one flag a layer."""
        value = self._get(name)
        return self._checked(name, value if isinstance(value, list) else [value], bool)

    def number(self, name: str, default: float | None = None) -> float:
        """Returns a number as a person would write the float32 it was stored as: 1e-06 and not 9.99999997e-07."""
        if default is not None and name not in self:
            return default
        value = self._checked(name, [self._get(name)], float)[0]
        if not 0 <= value < math.inf:
            raise InputError(f"key {ARCHITECTURE}.{name}: {value}, a finite number expected")
        return float(str(np.float32(value)))

    def _checked(self, name: str, values: list[Any], kind: type) -> list[Any]:
        if not values or any(type(value) is not kind for value in values):
            raise InputError(f"key {ARCHITECTURE}.{name}: values of type {kind.__name__} expected")
        if kind is int and not all(0 <= value < 2**31 for value in values):
            raise InputError(f"key {ARCHITECTURE}.{name}: counts below 2^31 expected")
        return values
