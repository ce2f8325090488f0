"""Our parameters in a GGUF file: one table of names and moves, and the bytes of a Q4_0 tensor.

GGUF keeps torch's order, [out, in] with the reduced axis last, which is also the order of a
`PackedArray`. A quantized tensor therefore needs no transposition of codes at all: pack it, put
each scale in front of its 16 bytes, and merge axes.

    block of 32 = 18 bytes:  | d float16, little endian | 16 bytes of `ggml_nibbles` |

Two of our parameters may share one tensor (the gate and up projections of experts); their rows
follow one another.

Source: `MODEL_ARCH.GEMMA4` in gguf-py and `src/models/gemma4.cpp` in ggml-org/llama.cpp;
`block_q4_0` in ggml-common.h.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Shaped, UInt8

from gemma_qat.checkpoint import moves
from gemma_qat.checkpoint.moves import Move
from gemma_qat.models.config import ModelConfig
from gemma_qat.models.declare import declare
from gemma_qat.numerics import Grid, PackedArray, QArray, pack
from gemma_qat.numerics.tiles import split_axes
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

ROPE_FACTORS = "rope_freqs.weight"
"""The one tensor that is none of our parameters: divisors of global rotary frequencies."""

Q4_0 = Grid(format="q4_0")

_BLOCK, _WORDS = 18, 16
"""Bytes of a block, and of them those that hold codes."""


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


def tensors_of(config: ModelConfig) -> dict[str, Tensor]:
    """Returns the tensors of a model by GGUF name, in declaration order, without `ROPE_FACTORS`."""
    found: dict[str, Tensor] = {}
    for parameter in declare(config).values():
        name, move = _place(parameter)
        before = found.get(name, Tensor(name=name, parameters=(), moves=()))
        found[name] = Tensor(
            name=name,
            parameters=(*before.parameters, parameter),
            moves=(*before.moves, move),
        )
    return found


def _place(parameter: Parameter) -> tuple[str, Move]:
    if parameter.layer is None:
        return _OUTSIDE[parameter.path]
    name, move = _LAYER[parameter.path.removeprefix(f"layers/{parameter.layer}/")]
    return f"blk.{parameter.layer}.{name}", move


def to_floats(
    arrays: Sequence[Shaped[np.ndarray, "..."]], tensor: Tensor
) -> Shaped[np.ndarray, "..."]:
    """Returns our float arrays as the GGUF tensor, in their own dtype."""
    return np.ascontiguousarray(tensor.moves[0].write(list(arrays), tensor.parameters[0]))


def from_floats(data: Shaped[np.ndarray, "..."], tensor: Tensor) -> list[Shaped[np.ndarray, "..."]]:
    """Returns our float arrays of a GGUF tensor, one per parameter."""
    pairs = zip(tensor.moves, tensor.parameters, strict=True)
    return [np.ascontiguousarray(move.read(data, parameter)) for move, parameter in pairs]


def to_blocks(arrays: Sequence[QArray], tensor: Tensor) -> UInt8[np.ndarray, "..."]:
    """Returns the Q4_0 blocks of quantized parameters.

    Shapes: result [..., out, in / 32 * 18].
    Exactness: codes and scales bit for bit; nothing is rounded.
    """
    rows = _rows(tensor)
    parts = []
    for q in arrays:
        packed = _pack(dataclasses.replace(q, codes=_on_host(q.codes), scale=_on_host(q.scale)))
        d = np.asarray(packed.scale).astype("<f2", copy=False)
        blocks = np.empty((*d.shape, _BLOCK), np.uint8)
        blocks[..., :-_WORDS] = d[..., None].view(np.uint8)
        blocks[..., -_WORDS:] = np.asarray(packed.words).reshape(*d.shape, _WORDS)
        parts.append(blocks.reshape(*rows, -1))
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-2)


def from_blocks(data: UInt8[np.ndarray, "..."], tensor: Tensor) -> list[QArray]:
    """Returns the codes and scales in Q4_0 blocks, one `QArray` per parameter, in host memory.

    Shapes: data [..., out, in / 32 * 18].
    """
    arrays = []
    halves = np.split(data, len(tensor.parameters), axis=-2)
    for part, parameter in zip(halves, tensor.parameters, strict=True):
        lead, length, trail = split_axes(parameter.shape, parameter.reduced)
        blocks = part.reshape(*lead, *trail, length // 32, _BLOCK)
        scale = np.ascontiguousarray(blocks[..., :-_WORDS]).view("<f2")[..., 0]
        words = np.ascontiguousarray(blocks[..., -_WORDS:]).reshape(*lead, *trail, length // 2)
        packed = PackedArray(
            words=_on_host(words),
            scale=_on_host(scale),
            grid=Q4_0,
            shape=parameter.shape,
            reduced=parameter.reduced,
        )
        arrays.append(_unpack(packed))
    return arrays


def _rows(tensor: Tensor) -> tuple[int, ...]:
    *outer, out, _ = tensor.shape
    return (*outer, out // len(tensor.parameters))


def _on_host(x: Any) -> jax.Array:
    # Moving bits needs no accelerator, and what it packs may not fit beside what is there.
    return jax.device_put(np.asarray(x), jax.devices("cpu")[0])


_pack = jax.jit(pack)
_unpack = jax.jit(PackedArray.unpack)
