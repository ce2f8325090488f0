"""FLOPs, active parameters and bytes, against hand computation, the traced program and XLA's own count."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params

from gemma_qat.errors import InputError
from gemma_qat.models import (
    FULL_SIZES,
    SIZES,
    Gemma4,
    ModelConfig,
    RunOptions,
    abstract_parameters,
    parameter_count,
    size_named,
    stack_layers,
)
from gemma_qat.models.account import (
    active_parameters,
    flops_per_token,
    forward_flops_by_role,
    forward_flops_per_token,
    keys_seen,
    parameter_bytes,
)

TWINS = tuple(name for name in SIZES if name.startswith("tiny_"))
LENGTH = 16


@pytest.mark.parametrize(
    ("length", "window", "expected"),
    [(4, None, 2.5), (4, 4, 2.5), (4, 1, 1.0), (5, 2, 9 / 5), (3, 7, 2.0), (1, None, 1.0)],
)
def test_keys_seen_by_hand(length: int, window: int | None, expected: float) -> None:
    """If it fails, the attention term counts pairs that the mask hides, or misses some."""
    assert keys_seen(length, window) == pytest.approx(expected, rel=1e-15)
    pairs = sum(1 for i in range(length) for j in range(i + 1) if window is None or i - j < window)
    assert keys_seen(length, window) * length == pairs


def test_an_empty_row_is_refused() -> None:
    """If it fails, a length of 0 divides by zero far from where it was given."""
    with pytest.raises(InputError, match="at least 1"):
        keys_seen(0, None)


def test_a_dense_layer_by_hand() -> None:
    """If it fails, a matrix is counted twice or not at all."""
    config = size_named("tiny_31b")  # D 128, N 4, F 256, V 1024; periods of 3 local, 1 global
    local = 128 * 4 * 32 + 2 * 128 * 4 * 32 + 4 * 32 * 128 + 3 * 128 * 256
    wide = 128 * 4 * 64 + 1 * 128 * 2 * 64 + 4 * 64 * 128 + 3 * 128 * 256  # the key is the value
    scores = 6 * 4 * 4 * 32 * keys_seen(100, 64) + 2 * 4 * 4 * 64 * keys_seen(100, None)
    expected = 2 * (6 * local + 2 * wide + 1024 * 128) + scores
    assert forward_flops_per_token(config, 100) == pytest.approx(expected, rel=1e-12)
    assert flops_per_token(config, 100) == pytest.approx(3 * expected, rel=1e-12)


def test_experts_and_per_layer_inputs_by_hand() -> None:
    """If it fails, experts a token does not use are counted, or tables that are only looked up."""
    moe = forward_flops_by_role(size_named("tiny_26b_a4b"), 8)
    assert moe["expert_gate"] == 6 * 2 * 2 * 96 * 64  # 6 layers, 2 of 8 experts of width 64
    assert moe["router"] == 6 * 2 * 96 * 8
    small = forward_flops_by_role(size_named("tiny_e2b"), 8)
    assert "per_layer_embed" not in small
    assert small["per_layer_model_projection"] == 2 * 128 * 6 * 32
    assert small["embed"] == 2 * 1024 * 128
    assert small["ffn_up"] == 2 * 128 * (4 * 256 + 2 * 512)  # KV-sharing layers are wider


def test_an_untied_head_costs_what_a_tied_one_does() -> None:
    """If it fails, the looked-up table is counted beside the head."""
    tied = size_named("tiny_12b")
    untied = dataclasses.replace(tied, ties_head=False)
    assert flops_per_token(tied, 8) == flops_per_token(untied, 8)
    assert active_parameters(untied) == active_parameters(tied) + tied.width


def traced_dots(jaxpr: Any) -> float:
    """FLOPs of the contractions of a traced program, loops multiplied out."""
    total = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (reduced, _), _ = eqn.params["dimension_numbers"]
            inner = math.prod(eqn.invars[0].aval.shape[axis] for axis in reduced)
            total += 2 * inner * eqn.outvars[0].aval.size
        elif eqn.primitive.name == "ragged_dot_general":
            total += 2 * eqn.invars[0].aval.shape[-1] * eqn.outvars[0].aval.size
        for inside in jaxprs_in_params(eqn.params):
            total += eqn.params.get("length", 1) * traced_dots(inside)
    return total


def forward(config: ModelConfig, options: RunOptions) -> tuple[Any, dict[str, Any], Any]:
    """The forward pass as a function of leaves and tokens, and abstract ones."""
    leaves = stack_layers(abstract_parameters(config, {}), config, {})
    tokens = jax.ShapeDtypeStruct((2, LENGTH), jnp.int32)

    def run(leaves: dict[str, Any], tokens: jax.Array) -> jax.Array:
        model = Gemma4(config, leaves, {}, options)
        return model.logits(model.hidden(tokens)[0])

    return run, leaves, tokens


@pytest.mark.parametrize("name", TWINS)
def test_the_traced_program_contracts_what_the_declarations_say(name: str) -> None:
    """If it fails, the count by declarations and the model have parted."""
    config = size_named(name)
    run, leaves, tokens = forward(config, RunOptions())
    found = traced_dots(jax.make_jaxpr(run)(leaves, tokens).jaxpr) / (2 * LENGTH)
    assert found == forward_flops_per_token(config, LENGTH, "full")


@pytest.mark.parametrize("name", ["tiny_31b", "tiny_e2b"])
def test_the_traced_training_step_contracts_three_times_that(name: str) -> None:
    """If it fails, the backward pass is not twice the forward pass."""
    config = size_named(name)
    run, leaves, tokens = forward(config, RunOptions())
    gradient = jax.grad(lambda leaves, tokens: jnp.sum(run(leaves, tokens)))
    found = traced_dots(jax.make_jaxpr(gradient)(leaves, tokens).jaxpr) / (2 * LENGTH)
    assert found == flops_per_token(config, LENGTH, "full")


def test_xla_counts_the_same_unrolled() -> None:
    """If it fails, a FLOP here is not what XLA calls one."""
    config = size_named("tiny_12b")
    run, leaves, tokens = forward(config, RunOptions(scan=False))
    analysis = jax.jit(run).lower(leaves, tokens).cost_analysis()
    ours = 2 * LENGTH * forward_flops_per_token(config, LENGTH, "full")
    # XLA adds elementwise work: a few operations per activation, against 2 x 96 per matrix output at this width.
    assert ours <= analysis["flops"] <= 1.1 * ours


@pytest.mark.parametrize("name", FULL_SIZES)
def test_full_sizes_cost_what_their_names_say(name: str) -> None:
    """If it fails, the sizes' active parameters are not what their names promise."""
    config = size_named(name)
    active = active_parameters(config)
    billions = {"e2b": 2.0, "e4b": 4.0, "12b": 12.0, "26b_a4b": 4.0, "31b": 31.0}[name]
    assert 0.9 <= active / 1e9 / billions <= 1.2
    assert parameter_bytes(config, "bfloat16") == 2 * parameter_count(config)
    # At one token a row attention is next to nothing: 6 FLOPs an active parameter, norms and looked-up rows aside.
    assert flops_per_token(config, 1) == pytest.approx(6 * active, rel=0.01)
