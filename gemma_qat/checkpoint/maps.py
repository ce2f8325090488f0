"""Names of our parameters in Hugging Face checkpoints: one table.

Source: `modeling_gemma4.py` and `modeling_gemma4_unified.py` in huggingface/transformers.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from gemma_qat.checkpoint import moves
from gemma_qat.checkpoint.moves import Move
from gemma_qat.models.config import ModelConfig
from gemma_qat.quant.sites import Parameter

_OUTSIDE: dict[str, tuple[str, Move]] = {
    "embed/table": ("embed_tokens.weight", moves.SAME),
    "head/table": ("lm_head.weight", moves.SAME),
    "per_layer/embed/table": ("embed_tokens_per_layer.weight", moves.MERGED_ROWS),
    "per_layer/projection/kernel": ("per_layer_model_projection.weight", moves.LINEAR),
    "per_layer/norm/weight": ("per_layer_projection_norm.weight", moves.SAME),
    "final_norm/weight": ("norm.weight", moves.SAME),
}

_LAYER: dict[str, tuple[str, Move]] = {
    "attn/q/kernel": ("self_attn.q_proj.weight", moves.LINEAR),
    "attn/k/kernel": ("self_attn.k_proj.weight", moves.LINEAR),
    "attn/v/kernel": ("self_attn.v_proj.weight", moves.LINEAR),
    "attn/o/kernel": ("self_attn.o_proj.weight", moves.LINEAR),
    "attn/q_norm/weight": ("self_attn.q_norm.weight", moves.SAME),
    "attn/k_norm/weight": ("self_attn.k_norm.weight", moves.SAME),
    "ffn/gate/kernel": ("mlp.gate_proj.weight", moves.LINEAR),
    "ffn/up/kernel": ("mlp.up_proj.weight", moves.LINEAR),
    "ffn/down/kernel": ("mlp.down_proj.weight", moves.LINEAR),
    "per_layer/gate/kernel": ("per_layer_input_gate.weight", moves.LINEAR),
    "per_layer/projection/kernel": ("per_layer_projection.weight", moves.LINEAR),
    "router/proj/kernel": ("router.proj.weight", moves.LINEAR),
    "router/scale": ("router.scale", moves.SAME),
    "router/per_expert_scale": ("router.per_expert_scale", moves.SAME),
    "experts/gate/kernel": ("experts.gate_up_proj", moves.EXPERT_FIRST_HALF),
    "experts/up/kernel": ("experts.gate_up_proj", moves.EXPERT_SECOND_HALF),
    "experts/down/kernel": ("experts.down_proj", moves.EXPERT),
    "pre_attn_norm/weight": ("input_layernorm.weight", moves.SAME),
    "post_attn_norm/weight": ("post_attention_layernorm.weight", moves.SAME),
    "pre_ffn_norm/weight": ("pre_feedforward_layernorm.weight", moves.SAME),
    "post_ffn_norm/weight": ("post_feedforward_layernorm.weight", moves.SAME),
    "post_per_layer_norm/weight": ("post_per_layer_input_norm.weight", moves.SAME),
    "post_dense_norm/weight": ("post_feedforward_layernorm_1.weight", moves.SAME),
    "pre_experts_norm/weight": ("pre_feedforward_layernorm_2.weight", moves.SAME),
    "post_experts_norm/weight": ("post_feedforward_layernorm_2.weight", moves.SAME),
    "scalar": ("layer_scalar", moves.SAME),
}

PREFIXES = ("model.language_model.", "model.")
"""Of multimodal and of text-only files."""

TOWERS = {
    "model.vision_tower.": "vision",
    "model.audio_tower.": "audio",
    "model.embed_vision.": "vision",
    "model.embed_audio.": "audio",
    "model.vision_embedder.": "vision",
}
"""Multimodal parts, which a text decoder leaves out by name."""


@dataclasses.dataclass(frozen=True)
class Foreign:
    """Where one of our parameters stands in a foreign checkpoint."""

    name: str
    """Without the prefix of the decoder; `lm_head.weight` never has one."""
    move: Move


def gathered(places: Mapping[str, Foreign]) -> dict[str, list[str]]:
    """Returns the checkpoint paths that each foreign tensor is made of, in the order its move takes them."""
    found: dict[str, list[str]] = {}
    for path in sorted(places, key=lambda path: places[path].move.part):
        found.setdefault(places[path].name, []).append(path)
    return found


def foreign(parameter: Parameter) -> Foreign:
    """Returns the Hugging Face tensor of a parameter."""
    if parameter.layer is None:
        return Foreign(*_OUTSIDE[parameter.path])
    prefix = f"layers/{parameter.layer}/"
    name, move = _LAYER[parameter.path.removeprefix(prefix)]
    return Foreign(f"layers.{parameter.layer}.{name}", move)


def is_dead(name: str, config: ModelConfig) -> bool:
    """Returns whether a tensor is one of the unused K/V tensors that the first E2B/E4B releases carry.

    `name` is without the prefix.
    """
    found = re.fullmatch(r"layers\.(\d+)\.self_attn\.(k_proj|v_proj|k_norm)\.weight", name)
    first_shared = config.layers - config.shared_kv_layers
    return found is not None and first_shared <= int(found[1]) < config.layers
