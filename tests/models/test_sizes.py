"""The full sizes without their arrays: if these fail, a released file no longer fits, or depth costs compile time."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from gemma_qat.models import (
    FULL_SIZES,
    SIZES,
    Gemma4,
    ModelConfig,
    RunOptions,
    abstract_parameters,
    declare,
    fit,
    stack_layers,
)
from gemma_qat.models.sizes import pattern

MANIFEST = Path(__file__).with_name("manifest.json")
COUNTS = {
    "e2b": 4_628_569_379,
    "e4b": 7_463_013_418,
    "12b": 11_907_350_320,
    "26b_a4b": 25_233_141_790,
    "31b": 30_697_345_340,
}


def digest(config: ModelConfig) -> dict[str, Any]:
    """Number of arrays and of elements, and a hash over `path shape axes reduced` of each, in path order."""
    lines = [
        f"{path} {list(p.shape)} {list(p.axes)} {list(p.reduced)}\n"
        for path, p in sorted(declare(config).items())
    ]
    return {
        "arrays": len(lines),
        "elements": sum(p.size for p in declare(config).values()),
        "sha256": hashlib.sha256("".join(lines).encode()).hexdigest(),
    }


def test_manifest_is_the_stored_one() -> None:
    """Paths and shapes are the checkpoint format; whoever means to change it stores the new digest."""
    stored = json.loads(MANIFEST.read_text("utf-8"))
    assert {name: digest(config) for name, config in SIZES.items()} == stored


@pytest.mark.parametrize("name", FULL_SIZES)
@pytest.mark.parametrize("recipe", [None, "q4_0"])
def test_forward_traces_at_full_size_and_allocates_nothing(name: str, recipe: str | None) -> None:
    config, plans = SIZES[name], fit(SIZES[name], recipe).plans if recipe else {}
    abstract = abstract_parameters(config, plans)
    assert sum(leaf.size for leaf in abstract.values()) == COUNTS[name]
    held = sum(array.nbytes for array in jax.live_arrays())
    leaves = stack_layers(abstract, config, plans)
    assert sum(leaf.size for leaf in leaves.values()) == COUNTS[name]
    assert max(leaf.shape[0] for path, leaf in leaves.items() if path.startswith("groups/")) <= 10

    def forward(leaves: dict[str, Any], tokens: jax.Array) -> jax.Array:
        model = Gemma4(config, leaves, plans, RunOptions(dtype="bfloat16"))
        return model.logits(model.hidden(tokens)[0])

    out = jax.eval_shape(forward, leaves, jax.ShapeDtypeStruct((2, 64), jnp.int32))
    assert (out.shape, out.dtype) == ((2, 64, 262_144), jnp.float32)
    assert sum(array.nbytes for array in jax.live_arrays()) <= held + 2**20


def test_learned_scales_are_declared_beside_their_weights() -> None:
    """One float32 scale per 32 weights of every planned site, for all of 26B A4B."""
    fitted = fit(SIZES["26b_a4b"], "q4_0", scales="learned")
    abstract = abstract_parameters(fitted.config, fitted.plans, dtype="bfloat16")
    scales = {path: leaf for path, leaf in abstract.items() if path.endswith("_scale")}
    scales.pop("layers/0/router/per_expert_scale", None)
    assert {f"{path}_scale" for path in fitted.plans} <= abstract.keys()
    for path in fitted.plans:
        assert scales[f"{path}_scale"].size * 32 == abstract[path].size, path
        assert scales[f"{path}_scale"].dtype == jnp.float32


def _lowered_size(layers: int, backward: bool) -> int:
    config = dataclasses.replace(SIZES["31b"], layer_kinds=pattern(layers, 6))
    plans = fit(config, "q4_0").plans
    leaves = stack_layers(abstract_parameters(config, plans), config, plans)
    tokens = jax.ShapeDtypeStruct((1, 32), jnp.int32)

    def total(leaves: dict[str, Any], tokens: jax.Array) -> jax.Array:
        model = Gemma4(config, leaves, plans, RunOptions(remat="full"))
        return jnp.sum(model.hidden(tokens)[0])

    function = jax.grad(total) if backward else total
    return len(jax.jit(function).lower(leaves, tokens).as_text())


@pytest.mark.parametrize("backward", [False, True])
def test_the_program_does_not_grow_with_depth(backward: bool) -> None:
    """12 layers or 60 of 31B lower to the same text but for digits; an unrolled stack would be 5 times as long."""
    shallow, deep = _lowered_size(12, backward), _lowered_size(60, backward)
    assert deep < 1.02 * shallow
