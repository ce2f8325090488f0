"""Static scales of activations, keys and values: each takes part, and every reader sees the rounded numbers."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_qat.decode import generate
from gemma_qat.models import (
    Gemma4,
    declare,
    float_parameters,
    packed_model,
    quantize_parameters,
    static_scale_paths,
    uncalibrated,
)
from gemma_qat.nn.cache import KeyValues


def _model(twin: Any, **changes: Any) -> Gemma4:
    parameters = jax.tree.map(jnp.asarray, twin.parameters | changes)
    return Gemma4.from_parameters(twin.fitted.config, parameters, twin.fitted.plans)


def test_the_released_scheme_has_these_scales(static_twin: Any) -> None:
    """Input and output of every quantized linear (not of looked-up tables), K and V of every layer that owns them."""
    declared, expected = declare(static_twin.fitted.config), set()
    for path, parameter in declared.items():
        if path not in static_twin.fitted.plans or parameter.role in ("embed", "per_layer_embed"):
            continue
        expected |= {f"{path}_input_scale", f"{path}_output_scale"}
        if parameter.role == "attn_k":
            expected |= {f"{path}_key_cache_scale", f"{path}_value_cache_scale"}
    assert set(static_scale_paths(static_twin.fitted.plans)) == expected
    assert uncalibrated(static_twin.parameters, static_twin.fitted.plans) == []


def test_every_static_scale_takes_part(static_twin: Any) -> None:
    """Halving one (its site saturates) or setting it to 0 (identity) shows in the logits, by turns."""
    fitted, tokens = static_twin.fitted, static_twin.tokens

    @jax.jit
    def logits(parameters: dict[str, jax.Array]) -> jax.Array:
        model = Gemma4.from_parameters(fitted.config, parameters, fitted.plans)
        return model.logits(model.hidden(tokens)[0])

    whole = jax.tree.map(jnp.asarray, static_twin.parameters)
    before, silent = np.asarray(logits(whole)), []
    for number, path in enumerate(static_scale_paths(fitted.plans)):
        factor = (0.5, 0.0)[number % 2]
        if np.array_equal(logits(whole | {path: whole[path] * factor}), before):
            silent.append((path, factor))
    assert silent == []


@pytest.mark.slow
def test_packed_weights_give_the_same_logits(static_twin: Any) -> None:
    """As in test_packed.py of tiny_e2b, here of every design: what is decoded is what was trained."""
    fitted = static_twin.fitted
    codes = quantize_parameters(static_twin.parameters, fitted)
    packed = packed_model(codes, float_parameters(static_twin.parameters, fitted), fitted)
    np.testing.assert_array_equal(
        packed(static_twin.tokens), _model(static_twin)(static_twin.tokens)
    )
    prompt = np.asarray(static_twin.tokens)[:1, :9]
    both = [generate(m, prompt, max_new_tokens=12) for m in (packed, _model(static_twin))]
    np.testing.assert_array_equal(*both)


def test_keys_and_values_are_on_their_grids_wherever_they_are_read(static_twin: Any) -> None:
    """Through the cache after a prefill: every owning layer's keys and values are whole steps of its two scales."""
    model = _model(static_twin)
    tokens = static_twin.tokens[:, :20]
    write = jax.jit(lambda caches: model.hidden(tokens, caches=caches, empty_cache=True)[1])
    caches = write(model.empty_caches(2, 64))
    owning = 0
    for g, group in enumerate(model.stack.schedule):
        for j, kv in enumerate(caches[g]):
            for r in range(group.repeats if isinstance(kv, KeyValues) else 0):
                owning += 1
                at = f"layers/{group.layer(r, j)}/attn/k/kernel"
                for name, array in (("key", kv.keys[r]), ("value", kv.values[r])):
                    scale = float(static_twin.parameters[f"{at}_{name}_cache_scale"][0])
                    steps = np.asarray(array, np.float64) / scale
                    assert np.abs(steps - np.round(steps)).max() < 1e-4  # float32 products
                    assert np.abs(steps).max() > 20
    shared = static_twin.fitted.config.shared_kv_layers
    assert owning == static_twin.fitted.config.layers - shared


@pytest.mark.parametrize("quantize", ["none", "weights"])
def test_a_schedule_acts_on_part_of_the_plans(static_twin: Any, quantize: Any) -> None:
    """If it fails, a run that is to begin in float does not, or begins with other leaves."""
    fitted, full = static_twin.fitted, _model(static_twin)
    leaves = full.leaves()
    partial = Gemma4(
        fitted.config, leaves, fitted.plans, dataclasses.replace(full.options, quantize=quantize)
    )
    zeros = {p: np.zeros(1, np.float32) for p in static_scale_paths(fitted.plans)}
    expected = _model(static_twin, **zeros)(static_twin.tokens)
    if quantize == "none":
        floats = {p: jnp.asarray(static_twin.parameters[p]) for p in declare(fitted.config)}
        expected = Gemma4.from_parameters(fitted.config, floats)(static_twin.tokens)
    # Other groups are scanned in the float model, so sums may associate differently.
    np.testing.assert_allclose(partial(static_twin.tokens), expected, atol=2e-5)
    assert not np.allclose(full(static_twin.tokens), expected, atol=1e-2)


def test_a_cache_of_fewer_bits_has_its_own_scales(static_twin: Any) -> None:
    """If it fails, codes of 4 bits count steps that were measured for 8: all larger keys and values are cut off."""
    model, tokens = _model(static_twin), static_twin.tokens[:, :5]

    def kept(kind: str) -> list[KeyValues]:
        caches = model.empty_caches(len(tokens), tokens.shape[1], kind)
        write = jax.jit(lambda caches: model.hidden(tokens, caches=caches, empty_cache=True)[1])
        return [one for group in write(caches) for one in group if one is not None]

    # The first layer reads the same numbers whatever the cache is.
    codes, floats = (kept(kind)[0].of_layer(0).own() for kind in ("int4", "float32"))
    for coded, value in ((codes.keys, floats.keys), (codes.values, floats.values)):
        off = np.abs(coded.dequantize()[:, :5] - value)
        assert np.all(off <= (0.5 + 1e-5) * np.asarray(coded.scale)[:, :5, :, None])
