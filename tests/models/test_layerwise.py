"""The model a layer at a time is the model, and what it says of its weights' inputs is what went in."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import drawn_parameters

from gemma_qat.models import Gemma4, Layerwise, fit, size_named
from gemma_qat.nn.moments import grouped_moments_of, moments_of


def _batch(vocab, rows=2, length=24):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocab, (rows, length), dtype=np.int32)
    segments = np.ones_like(tokens)
    segments[1, 10:20], segments[1, 20:] = 2, 0
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    positions[1, 10:20] = np.arange(10)
    return {"tokens": tokens, "positions": positions, "segments": segments}


@pytest.mark.parametrize(
    ("size", "recipe"),
    [pytest.param("tiny_e2b", "q4_0", marks=pytest.mark.slow), ("tiny_26b_a4b", "float")],
)
def test_layers_one_by_one_are_the_stack(size, recipe):
    """If it fails, PTQ and block-wise training see other numbers than the model makes."""
    config, plans = size_named(size), {}
    kinds = ("sliding", "full") if config.experts else ("sliding", "full", "sliding")
    shared = 1 if config.shared_kv_layers else 0
    config = dataclasses.replace(config, layer_kinds=kinds, shared_kv_layers=shared)
    if recipe != "float":
        fitted = fit(config, recipe)
        config, plans = fitted.config, fitted.plans
    parameters, batch = drawn_parameters(config, 0), _batch(config.vocab_size)
    model = Gemma4.from_parameters(config, parameters, plans)
    expected, _ = jax.jit(lambda b: model.hidden(b["tokens"], b["positions"], b["segments"]))(batch)
    walk = Layerwise(config, plans)
    flow = walk.begin(parameters, batch)
    for index in range(config.layers):
        flow = walk.layer(index, walk.leaves_of(parameters, index), flow)
    found = walk.finish(parameters, flow)
    assert float(jnp.max(jnp.abs(found - expected))) < 2e-4


def test_moments_are_sums_of_products_of_inputs():
    """If it fails, GPTQ and AWQ weigh errors by the wrong inputs; padding must not count."""
    config = size_named("tiny_26b_a4b")
    parameters, batch = drawn_parameters(config, 0), _batch(config.vocab_size)
    walk = Layerwise(config)
    flow = walk.begin(parameters, batch)
    leaves = walk.leaves_of(parameters, 0)
    full = walk.moments(0, leaves, flow, full=True)
    diagonal = walk.moments(0, leaves, flow, full=False)
    assert set(full) == {f"attn/{n}/kernel" for n in "qkvo"} | {"router/proj/kernel"} | {
        f"{part}/{n}/kernel" for part in ("ffn", "experts") for n in ("gate", "up", "down")
    }
    x = np.asarray(flow.x, np.float64)
    weight = np.asarray(leaves["pre_attn_norm/weight"], np.float64)
    normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + config.eps) * weight
    rows = normed[batch["segments"] > 0]
    np.testing.assert_allclose(full["attn/q/kernel"]["sum"], rows.T @ rows, rtol=1e-4, atol=1e-3)
    assert float(full["attn/q/kernel"]["count"]) == 44
    experts = full["experts/down/kernel"]
    assert experts["sum"].shape == (8, 64, 64)
    assert float(experts["count"].sum()) == 44 * config.experts.per_token
    for name, sums in diagonal.items():
        whole = jnp.diagonal(full[name]["sum"], axis1=-2, axis2=-1)
        np.testing.assert_allclose(sums["sum"], whole, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(sums["count"], full[name]["count"])


def test_moments_of_experts_are_of_their_own_rows():
    """If it fails, an expert is quantized for tokens that never reach it."""
    rng = np.random.default_rng(1)
    x, sizes = rng.normal(size=(12, 4)).astype(np.float32), np.asarray([3, 0, 5])
    valid = np.ones(12, bool)
    valid[1] = False
    found = grouped_moments_of(jnp.asarray(x), jnp.asarray(valid), jnp.asarray(sizes), full=True)
    for expert, (first, last) in enumerate(((0, 3), (3, 3), (3, 8))):
        own = x[first:last][valid[first:last]]
        alone = moments_of(jnp.asarray(own), 1, jnp.ones(len(own), bool), full=True)
        np.testing.assert_allclose(found["sum"][expert], alone["sum"], rtol=1e-5, atol=1e-6)
        assert float(found["count"][expert]) == len(own)
