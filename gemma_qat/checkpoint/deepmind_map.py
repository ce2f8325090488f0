"""Names of our parameters in DeepMind's trees: one table, and the two layouts it is written in.

| layout | layer 17 (period 5) |
|---|---|
| by layer | `layer_17/attn/q_einsum/w` |
| stacked | `stacked_layers/attention_type_2/attn/q_einsum/w`, at 3 of the leading axis: 17 = 3 * 5 + 2 |

Names here are without a last `/w`, which some trees write and others do not. In the mixture of experts `mlp` are the
experts and `mlp2` the dense branch, so the norms around them cross over.

Source: `gm/nn/gemma4` in google-deepmind/gemma and `convert_gemma4_weights.py` in huggingface/transformers.
"""

from __future__ import annotations

from collections.abc import Iterable

from gemma_qat.checkpoint.maps import Foreign
from gemma_qat.checkpoint.moves import SAME, Move, stacked, transposed
from gemma_qat.errors import InputError
from gemma_qat.models.config import ModelConfig
from gemma_qat.models.declare import declare
from gemma_qat.quant.sites import Parameter

_HEADS_FIRST = transposed("heads_first", 1, 0, 2)
_OUT_IN = transposed("out_in", 1, 0)
_EXPERT_OUT_IN = transposed("expert_out_in", 0, 2, 1)

_OUTSIDE: dict[str, tuple[str, Move]] = {
    "embed/table": ("embedder/input_embedding", SAME),
    "per_layer/embed/table": ("embedder/per_layer_embeddings", SAME),
    "per_layer/projection/kernel": ("embedder/per_layer_model_projection", SAME),
    "per_layer/norm/weight": ("embedder/per_layer_projection_norm/scale", SAME),
    "final_norm/weight": ("final_norm/scale", SAME),
}

_LAYER: dict[str, tuple[str, Move]] = {
    "attn/q/kernel": ("attn/q_einsum", _HEADS_FIRST),
    "attn/k/kernel": ("attn/kv_einsum", stacked(_HEADS_FIRST, 0, 2)),
    "attn/v/kernel": ("attn/kv_einsum", stacked(_HEADS_FIRST, 1, 2)),
    "attn/o/kernel": ("attn/attn_vec_einsum", SAME),
    "attn/q_norm/weight": ("attn/query_norm/scale", SAME),
    "attn/k_norm/weight": ("attn/key_norm/scale", SAME),
    "ffn/gate/kernel": ("mlp/gating_einsum", stacked(_OUT_IN, 0, 2)),
    "ffn/up/kernel": ("mlp/gating_einsum", stacked(_OUT_IN, 1, 2)),
    "ffn/down/kernel": ("mlp/linear", SAME),
    "per_layer/gate/kernel": ("per_layer_input_gate", SAME),
    "per_layer/projection/kernel": ("per_layer_projection", SAME),
    "pre_attn_norm/weight": ("pre_attention_norm/scale", SAME),
    "post_attn_norm/weight": ("post_attention_norm/scale", SAME),
    "pre_ffn_norm/weight": ("pre_ffw_norm/scale", SAME),
    "post_ffn_norm/weight": ("post_ffw_norm/scale", SAME),
    "post_per_layer_norm/weight": ("post_per_layer_input_norm/scale", SAME),
    "scalar": ("skip_scale", SAME),
}

_KEY_IS_VALUE: dict[str, tuple[str, Move]] = {"attn/k/kernel": ("attn/k_einsum", _HEADS_FIRST)}
"""What differs in layers whose key projection is their value too."""

_WITH_EXPERTS: dict[str, tuple[str, Move]] = {
    "ffn/gate/kernel": ("mlp2/gating_einsum", stacked(_OUT_IN, 0, 2)),
    "ffn/up/kernel": ("mlp2/gating_einsum", stacked(_OUT_IN, 1, 2)),
    "ffn/down/kernel": ("mlp2/linear", SAME),
    "router/proj/kernel": ("mlp/router_logits", SAME),
    "router/scale": ("mlp/router_scale", SAME),
    "router/per_expert_scale": ("mlp/per_expert_scale", SAME),
    "experts/gate/kernel": ("mlp/gating_einsum", stacked(_EXPERT_OUT_IN, 0, 2, axis=1)),
    "experts/up/kernel": ("mlp/gating_einsum", stacked(_EXPERT_OUT_IN, 1, 2, axis=1)),
    "experts/down/kernel": ("mlp/linear", SAME),
    "pre_ffn_norm/weight": ("pre_ffw2_norm/scale", SAME),
    "post_dense_norm/weight": ("post_ffw2_norm/scale", SAME),
    "pre_experts_norm/weight": ("pre_ffw_norm/scale", SAME),
    "post_experts_norm/weight": ("post_ffw1_norm/scale", SAME),
}
"""What differs in layers with experts."""

TOWERS = {
    "vision_encoder/": "vision",
    "PatchInputVariablePoolingEncoder_0/": "vision",
    "embedder/mm_": "vision",
    "audio_encoder/": "audio",
    "AudioEncoder/": "audio",
    "embedder/audio_": "audio",
}
"""Multimodal parts, which a text decoder leaves out by name."""

UNUSED_NAMES = ("attn/kv_einsum", "attn/k_einsum", "attn/key_norm/scale")
"""What layers that share another's keys and values carry all the same."""


def places(config: ModelConfig, *, stacks: bool = False) -> dict[str, Foreign]:
    """Returns where every declared parameter stands, layer by layer or with repeats of the period stacked.

    Raises: InputError for an untied head, or for layers that cannot be stacked because their shapes differ.
    """
    if not config.ties_head:
        raise InputError(f"{config.name}: DeepMind's trees have no head of their own")
    declared = declare(config)
    found = {path: _single(parameter, config) for path, parameter in declared.items()}
    return _stacked(found, declared, config) if stacks else found


def _single(parameter: Parameter, config: ModelConfig) -> Foreign:
    if parameter.layer is None:
        return Foreign(*_OUTSIDE[parameter.path])
    shape = config.layer_shape(parameter.layer)
    table = _LAYER | (_WITH_EXPERTS if shape.experts else {})
    table |= _KEY_IS_VALUE if shape.key_equals_value else {}
    name, move = table[parameter.path.removeprefix(f"layers/{parameter.layer}/")]
    return Foreign(f"layer_{parameter.layer}/{name}", move)


def period(config: ModelConfig) -> int:
    """Returns after how many layers their kinds repeat."""
    kinds = config.layer_kinds
    return next(
        n for n in range(1, len(kinds) + 1)
        if len(kinds) % n == 0 and kinds == kinds[:n] * (len(kinds) // n)
    )  # fmt: skip


def _stacked(
    found: dict[str, Foreign], declared: dict[str, Parameter], config: ModelConfig
) -> dict[str, Foreign]:
    length = period(config)
    count = config.layers // length
    out, shapes = {}, dict[str, tuple[int, ...]]()
    for path, place in found.items():
        parameter = declared[path]
        if parameter.layer is None:
            out[path] = place
            continue
        repeat, position = divmod(parameter.layer, length)
        name = f"stacked_layers/attention_type_{position}/{place.name.split('/', 1)[1]}"
        single = place.move.shape(parameter)
        if shapes.setdefault(name, single) != single:
            raise InputError(
                f"{config.name}: {name} cannot be a stack, its layers have the shapes {shapes[name]} and {single}"
            )
        out[path] = Foreign(name, stacked(place.move, repeat, count))
    return out


def canonical(keys: Iterable[str]) -> str:
    """Returns the name that the tables use for a leaf of a tree, nested or flat, with any prefix."""
    name = "/".join(keys)
    for prefix in ("params/", "rlx_networks/policy_network/", "transformer/"):
        name = name.removeprefix(prefix)
    return name.removesuffix("/w")
