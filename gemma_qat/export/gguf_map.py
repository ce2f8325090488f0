"""Our parameters in a GGUF file: one table of names and moves.

Two of our parameters may share one tensor (the gate and up projections of experts); their rows
follow one another. Files of other programs may have them apart, as `ffn_gate_exps` and `ffn_up_exps`: gguf-py's table
of this architecture does not list those, but llama.cpp looks for them where the fused tensor is missing.

Source: `MODEL_ARCH.GEMMA4` in gguf-py and `src/models/gemma4.cpp` in ggml-org/llama.cpp.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

import numpy as np
from jaxtyping import Shaped

from gemma_qat.checkpoint import moves
from gemma_qat.checkpoint.moves import Move
from gemma_qat.models.config import ModelConfig
from gemma_qat.models.declare import declare
from gemma_qat.quant.sites import Parameter

_OUTSIDE: dict[str, tuple[str, Move]] = {
    "embed/table": ("token_embd.weight", moves.SAME),
    "head/table": ("output.weight", moves.SAME),
    "per_layer/embed/table": ("per_layer_token_embd.weight", moves.MERGED_ROWS),
    "per_layer/projection/kernel": ("per_layer_model_proj.weight", moves.LINEAR),
    "per_layer/norm/weight": ("per_layer_proj_norm.weight", moves.SAME),
    "final_norm/weight": ("output_norm.weight", moves.SAME),
}

_LAYER: dict[str, tuple[str, Move]] = {
    "attn/q/kernel": ("attn_q.weight", moves.LINEAR),
    "attn/k/kernel": ("attn_k.weight", moves.LINEAR),
    "attn/v/kernel": ("attn_v.weight", moves.LINEAR),
    "attn/o/kernel": ("attn_output.weight", moves.LINEAR),
    "attn/q_norm/weight": ("attn_q_norm.weight", moves.SAME),
    "attn/k_norm/weight": ("attn_k_norm.weight", moves.SAME),
    "ffn/gate/kernel": ("ffn_gate.weight", moves.LINEAR),
    "ffn/up/kernel": ("ffn_up.weight", moves.LINEAR),
    "ffn/down/kernel": ("ffn_down.weight", moves.LINEAR),
    "per_layer/gate/kernel": ("inp_gate.weight", moves.LINEAR),
    "per_layer/projection/kernel": ("proj.weight", moves.LINEAR),
    "router/proj/kernel": ("ffn_gate_inp.weight", moves.LINEAR),
    "router/scale": ("ffn_gate_inp.scale", moves.SAME),
    "router/per_expert_scale": ("ffn_down_exps.scale", moves.SAME),
    "experts/gate/kernel": ("ffn_gate_up_exps.weight", moves.EXPERT_FIRST_HALF),
    "experts/up/kernel": ("ffn_gate_up_exps.weight", moves.EXPERT_SECOND_HALF),
    "experts/down/kernel": ("ffn_down_exps.weight", moves.EXPERT),
    "pre_attn_norm/weight": ("attn_norm.weight", moves.SAME),
    "post_attn_norm/weight": ("post_attention_norm.weight", moves.SAME),
    "pre_ffn_norm/weight": ("ffn_norm.weight", moves.SAME),
    "post_ffn_norm/weight": ("post_ffw_norm.weight", moves.SAME),
    "post_per_layer_norm/weight": ("post_norm.weight", moves.SAME),
    "post_dense_norm/weight": ("post_ffw_norm_1.weight", moves.SAME),
    "pre_experts_norm/weight": ("pre_ffw_norm_2.weight", moves.SAME),
    "post_experts_norm/weight": ("post_ffw_norm_2.weight", moves.SAME),
    "scalar": ("layer_output_scale.weight", moves.SAME),
}

_FUSED = "ffn_gate_up_exps.weight"
_APART: dict[str, tuple[str, Move]] = {
    "experts/gate/kernel": ("ffn_gate_exps.weight", moves.EXPERT),
    "experts/up/kernel": ("ffn_up_exps.weight", moves.EXPERT),
}
"""Where the tensor `_FUSED` of a layer is not there."""

ROPE_FACTORS = "rope_freqs.weight"
"""The one tensor that is none of our parameters: divisors of global rotary frequencies."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
    """A GGUF tensor and the parameters whose rows it holds, in order.

    Shapes: `shape` is [..., out, in], as gguf-py's reader gives arrays; the file itself lists it
        backwards.
    """

    name: str
    parameters: tuple[Parameter, ...]
    moves: tuple[Move, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in elements."""
        return self.moves[0].shape(self.parameters[0])

    @property
    def is_matrix(self) -> bool:
        """Whether it may be stored in half precision: a contraction or table, not the router."""
        first = self.parameters[0]
        return first.is_site and first.role != "router"


def tensors_of(config: ModelConfig, names: Collection[str] = ()) -> dict[str, Tensor]:
    """Returns the tensors of a model by GGUF name, in declaration order, without `ROPE_FACTORS`.

    `names` are those of a file that is read: they say in which layers the experts' gate and up stand apart.
    """
    found: dict[str, Tensor] = {}
    for parameter in declare(config).values():
        name, move = _place(parameter, names)
        before = found.get(name, Tensor(name=name, parameters=(), moves=()))
        found[name] = Tensor(
            name=name,
            parameters=(*before.parameters, parameter),
            moves=(*before.moves, move),
        )
    return found


def _place(parameter: Parameter, names: Collection[str]) -> tuple[str, Move]:
    if parameter.layer is None:
        return _OUTSIDE[parameter.path]
    block, path = (
        f"blk.{parameter.layer}",
        parameter.path.removeprefix(f"layers/{parameter.layer}/"),
    )
    name, move = _LAYER[path]
    if path in _APART and f"{block}.{_FUSED}" not in names:
        apart = _APART[path]
        name, move = apart if f"{block}.{apart[0]}" in names else (name, move)
    return f"{block}.{name}", move


def to_floats(
    arrays: Sequence[Shaped[np.ndarray, "..."]], tensor: Tensor
) -> Shaped[np.ndarray, "..."]:
    """Returns our float arrays as the GGUF tensor, in their own dtype."""
    return np.ascontiguousarray(tensor.moves[0].write(list(arrays), tensor.parameters[0]))


def from_floats(data: Shaped[np.ndarray, "..."], tensor: Tensor) -> list[Shaped[np.ndarray, "..."]]:
    """Returns our float arrays of a GGUF tensor, one per parameter."""
    pairs = zip(tensor.moves, tensor.parameters, strict=True)
    return [np.ascontiguousarray(move.read(data, parameter)) for move, parameter in pairs]
