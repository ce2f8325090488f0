"""What a model costs, counted from its declarations: parameters, bytes, multiplications.

Model FLOPs are those that the definition of the model asks for, whatever a program does to get there: nothing that is
recomputed, padded, masked out or rounded counts. One multiply-add is two FLOPs; only contractions count (norms, softmax
and look-ups are elementwise and small beside them).

    a matrix                    2 x its elements, per token
    an expert matrix            2 x its elements x (experts a token uses / experts)
    a table that is looked up   0, but the head's 2 x V x D
    attention of a layer        2 x 2 x N x H x (keys a token sees, mean over the row)
    backward                    2 x forward: each contraction has two operands to differentiate

Keys a token sees: itself and those before it, at most the window. With `attention="full"` every query meets every key
of its row, as in the PaLM paper and as a program without block skipping computes it.

Source: PaLM (arXiv 2204.02311), appendix B: model FLOPs utilization is (tokens/s) x (model FLOPs per token) / peak, and
recomputation does not count. It takes 6 N + 12 L H Q T per token; this differs by leaving out what the mask hides, by
the window, by counting only the experts a token uses, and by not counting tables that are looked up.
"""

from __future__ import annotations

import collections
from typing import Literal

import numpy as np

from gemma_qat.errors import InputError
from gemma_qat.models.config import ModelConfig
from gemma_qat.models.declare import declare
from gemma_qat.quant.sites import EXPERTS, Parameter

Attention = Literal["visible", "full"]
"""Which query-key pairs count: those the mask lets through, or all pairs of a row."""

BACKWARD = 2.0
"""FLOPs of the backward pass over those of the forward pass."""


def keys_seen(length: int, window: int | None) -> float:
    """Returns how many keys a token of a row of `length` sees, itself included: the mean over the row.

    Raises: InputError when the row is empty.
    """
    if length < 1:
        raise InputError(f"a row of {length} tokens: at least 1 expected")
    reach = length if window is None else min(window, length)
    # The first `reach` tokens see 1, 2, ... reach keys, every later one `reach`.
    return (reach * (reach + 1) / 2 + (length - reach) * reach) / length


def forward_flops_by_role(
    config: ModelConfig, length: int, attention: Attention = "visible"
) -> dict[str, float]:
    """Returns the FLOPs of the forward pass per token, by role of the matrix, and `attention` for scores and sums.

    Units: FLOPs per token of a row of `length` tokens that is one segment.
    """
    found: dict[str, float] = collections.defaultdict(float)
    for parameter in declare(config).values():
        found[parameter.role] += 2.0 * _uses(config, parameter) * parameter.size
    for shape in config.layer_shapes():
        keys = float(length) if attention == "full" else keys_seen(length, shape.window)
        found["attention"] += 4.0 * shape.query_heads * shape.head_width * keys
    return {role: flops for role, flops in found.items() if flops}


def _uses(config: ModelConfig, parameter: Parameter) -> float:
    """How often one token multiplies by each element of an array."""
    if not parameter.is_site or parameter.role == "per_layer_embed":
        return 0.0
    if parameter.role == "embed":
        return float(config.ties_head)
    if parameter.role in EXPERTS and config.experts is not None:
        return config.experts.per_token / config.experts.count
    return 1.0


def forward_flops_per_token(
    config: ModelConfig, length: int, attention: Attention = "visible"
) -> float:
    """Returns the model FLOPs of the forward pass, head included, per token of a row of `length` tokens."""
    return sum(forward_flops_by_role(config, length, attention).values())


def flops_per_token(config: ModelConfig, length: int, attention: Attention = "visible") -> float:
    """Returns the model FLOPs of a training step, forward and backward without recomputation, per token.

    A teacher of config t adds `forward_flops_per_token(t, length)`.
    """
    return (1 + BACKWARD) * forward_flops_per_token(config, length, attention)


def active_parameters(config: ModelConfig) -> int:
    """Returns the elements one token's forward pass reads: all but the experts it does not use.

    A row of a looked-up table counts as that row; a tied table counts whole, for the head.
    """
    total = 0.0
    for parameter in declare(config).values():
        if parameter.role in EXPERTS:
            total += parameter.size * _uses(config, parameter)
        elif parameter.role == "per_layer_embed" or (
            parameter.role == "embed" and not config.ties_head
        ):
            total += parameter.size / parameter.shape[0]
        else:
            total += parameter.size
    return round(total)


def parameter_bytes(config: ModelConfig, dtype: str = "float32") -> int:
    """Returns the bytes of all stored arrays in one dtype, scales of a recipe not included."""
    # jax registers bfloat16 with numpy under this name.
    return sum(p.size for p in declare(config).values()) * np.dtype(dtype).itemsize
