"""Models small enough to be compiled many times, with widths that cut two and four ways into whole tiles of 32.

Layers are equal, so that one of them is compiled and a scan runs it. No other array has 160 rows, or 8 matrices: tables and
stacks of experts show in a compiled program by their shape.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gemma_qat.models import Fitted, ModelConfig, declare, fit, static_scale_paths
from gemma_qat.nn.shapes import ExpertsShape
from gemma_qat.sharding import MeshConfig

VOCAB, ROWS, LENGTH = 160, 8, 8
_COMMON: dict[str, Any] = {
    "layer_kinds": ("sliding",) * 2, "vocab_size": VOCAB, "width": 128, "query_heads": 4,
    "kv_heads": 2, "global_kv_heads": 2, "head_width": 32, "global_head_width": 64, "ffn_width": 256,
    "window": 4, "max_positions": 64,
}  # fmt: skip

TWINS: dict[str, ModelConfig] = {
    "dense": ModelConfig(
        name="dense", **_COMMON | {"layer_kinds": ("full",) * 2}, key_equals_value=True
    ),
    "e_series": ModelConfig(
        name="e_series", **_COMMON | {"kv_heads": 1, "layer_kinds": ("sliding",) * 3},
        shared_kv_layers=2, shared_ffn_width=512,
        per_layer_width=32, per_layer_vocab=VOCAB,
    ),
    "moe": ModelConfig(
        name="moe", **_COMMON,
        experts=ExpertsShape(count=8, per_token=2, width=64),
    ),
}  # fmt: skip

MESHES: dict[str, MeshConfig] = {
    "fsdp": MeshConfig(preset="fsdp", data=2),
    "fsdp+tensor": MeshConfig(preset="fsdp+tensor", data=2, tensor=2),
    "fsdp+expert": MeshConfig(preset="fsdp+expert", expert=4),
    "decode": MeshConfig(preset="decode", data=2, fsdp=1, tensor=4),
    "one": MeshConfig(preset="fsdp", fsdp=1),
}
"""All but the last over eight devices."""


def model_of(family: str, recipe: str) -> Fitted | ModelConfig:
    """A twin, with a recipe and recomputed scales unless the recipe is `float`."""
    return TWINS[family] if recipe == "float" else fit(TWINS[family], recipe)


def parameters_of(config: ModelConfig, plans: Any) -> dict[str, np.ndarray]:
    """Random parameters by checkpoint path, static scales of activations set to what such activations reach."""
    rng = np.random.default_rng(0)
    out: dict[str, np.ndarray] = {}
    for path, p in declare(config).items():
        draw = (
            rng.uniform(0.8, 1.25, p.shape)
            if p.init == "constant"
            else rng.standard_normal(p.shape)
        )
        out[path] = (p.init_scale * draw).astype(np.float32)
    return out | {path: np.full(1, 4 / 127, np.float32) for path in static_scale_paths(plans)}


def batch() -> dict[str, np.ndarray]:
    """Two segments a row, padding in some, every token once or more."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32)
    segments = np.where(np.arange(LENGTH)[None] < rng.integers(2, 6, ROWS)[:, None], 1, 2)
    segments[::3, -1] = 0
    starts = np.argmax(segments[:, :, None] == segments[:, None, :], axis=-1)
    positions = np.arange(LENGTH)[None] - starts
    return {
        "tokens": tokens, "segments": segments.astype(np.int32), "positions": positions.astype(np.int32),
        "targets": np.roll(tokens, -1, 1), "weights": (segments > 0).astype(np.float32),
    }  # fmt: skip


def keep_gradient(learning_rate: float) -> optax.GradientTransformation:
    """Plain SGD whose state is the gradient of the last step."""

    def update(gradient: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del state, params
        return jax.tree.map(lambda g: -learning_rate * g, gradient), gradient

    return optax.GradientTransformation(lambda p: jax.tree.map(jnp.zeros_like, p), update)
