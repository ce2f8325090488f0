"""Directories of the hub, loaded by huggingface/transformers and compressed-tensors, which say whether they are right.

Run with torch 2.13.0, transformers 5.23.0 and compressed-tensors 0.20.0 installed:
    bash launch/test.sh -m judges tests/judges -s
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_qat import api
from gemma_qat.export import (
    Artifact,
)
from gemma_qat.models import Gemma4, fit, initialize, packed_model, size_named

pytestmark = pytest.mark.judges

TOKENS = np.random.default_rng(7).integers(3, 64, (4, 24))


@pytest.fixture(scope="module", autouse=True)
def transformers() -> Any:
    """The judge."""
    reason = "needs torch, transformers and compressed-tensors"
    pytest.importorskip("torch", reason=reason)
    pytest.importorskip("compressed_tensors", reason=reason)
    return pytest.importorskip("transformers", reason=reason)


def _config(kind: str) -> Any:
    base = size_named({"e": "tiny_e2b", "dense": "tiny_31b", "moe": "tiny_26b_a4b"}[kind])
    layers = ("sliding", "full") * (2 if kind == "e" else 1)
    small = dataclasses.replace(base, layer_kinds=layers, vocab_size=64)
    if kind == "e":
        small = dataclasses.replace(small, per_layer_vocab=64, shared_kv_layers=2)
    return small


def _parameters(config: Any) -> dict[str, jax.Array]:
    """Random weights in which every scalar that a converter may drop shows."""
    rng = np.random.default_rng(11)
    found = {}
    for path, array in initialize(config, 3).items():
        shown = array.ndim == 1
        found[path] = array * jnp.asarray(rng.uniform(0.7, 1.3, array.shape)) if shown else array
    return found


def _artifact(kind: str, recipe: str) -> Artifact:
    model = Gemma4.from_parameters(_config(kind), _parameters(_config(kind)))
    static = fit(model.config, recipe).plans
    calibration = TOKENS if any(plan.static_scales for plan in static.values()) else None
    fitted, codes, floats = api.quantized_parts(model, recipe, "rtn", calibration)
    return Artifact(
        config=fitted.config, recipe=fitted.recipe, plans=fitted.plans, quantized=codes,
        floats={path: np.asarray(leaf) for path, leaf in floats.items()},
    )  # fmt: skip


def _load(directory: Path, **options: Any) -> tuple[Any, dict[str, Any]]:
    import torch
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.float32,
        output_loading_info=True,
        attn_implementation="eager",
        **options,
    )
    return model.eval(), {name: value for name, value in info.items() if value}


def _logits(model: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)).logits.numpy()


def _ours(artifact: Artifact) -> np.ndarray:
    from gemma_qat.models import Fitted

    fitted = Fitted(config=artifact.config, recipe=artifact.recipe, plans=artifact.plans)
    return np.asarray(
        packed_model(artifact.quantized, artifact.floats, fitted)(jnp.asarray(TOKENS))
    )
