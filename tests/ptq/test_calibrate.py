"""Calibration of static scales: if these fail, scales are not those of the text, or an expert goes without."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_qat.errors import InputError
from gemma_qat.models import (
    SIZES,
    Gemma4,
    ModelConfig,
    declare,
    fit,
    initialize,
    packed_model,
    static_scale_paths,
)
from gemma_qat.models.sizes import pattern
from gemma_qat.ptq import Calibrated, CalibrationConfig, calibrate, quantize_model

MOE = dataclasses.replace(
    SIZES["tiny_26b_a4b"], name="small", vocab_size=64, layer_kinds=pattern(3, 3), width=32,
    head_width=8, global_head_width=16, ffn_width=32, window=8,
)  # fmt: skip
FITTED = fit(MOE, "mobile_like")


def _batch(seed: int) -> dict[str, jax.Array]:
    tokens = jnp.asarray(np.random.default_rng(seed).integers(0, 64, (2, 16)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(16)[None], tokens.shape)
    return {"tokens": tokens, "positions": positions, "segments": jnp.ones_like(tokens)}


@jax.jit
def _run(model: Gemma4, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (logits, what the last norm leaves)."""
    taps: dict[str, Any] = {}
    hidden, _ = model.hidden(tokens, taps=taps)
    return model.logits(hidden), taps["final_norm"]


@pytest.fixture(scope="module")
def model() -> Gemma4:
    parameters = FITTED.adopt(initialize(MOE, 0))
    return Gemma4.from_parameters(FITTED.config, parameters, FITTED.plans)


def test_max_is_the_largest_that_passed(model: Gemma4) -> None:
    """Against taps at two places whose values are known from outside: the head's result, and a layer's norm."""
    batches = [_batch(1), _batch(2)]
    found = calibrate(model, batches, CalibrationConfig(method="max", batches=2))
    assert found.scales.keys() == set(static_scale_paths(FITTED.plans))
    before_cap, after_norm = [], []
    for batch in batches:
        logits, normed = _run(model, batch["tokens"])
        before_cap.append(float(jnp.abs(30 * jnp.arctanh(logits / 30)).max()))
        after_norm.append(float(jnp.abs(normed).max()))
    head = {
        name: float(found.scales[f"head/table_{name}"][0]) * 127
        for name in ("input_scale", "output_scale")
    }
    np.testing.assert_allclose(head["input_scale"], max(after_norm), rtol=1e-5)
    np.testing.assert_allclose(head["output_scale"], max(before_cap), rtol=1e-4)  # atanh of a tanh


def test_only_so_many_batches_are_looked_at(model: Gemma4) -> None:
    """One batch of two gives the same as one alone, and what is calibrated already does not matter."""
    one = calibrate(model, [_batch(1)])
    first = calibrate(model, [_batch(1), _batch(3)], CalibrationConfig(batches=1))
    ready = {path: jnp.asarray(scale) for path, scale in one.scales.items()}
    parameters = model.parameters() | ready
    again = calibrate(Gemma4.from_parameters(FITTED.config, parameters, FITTED.plans), [_batch(1)])
    for other in (first, again):
        for path, scale in one.scales.items():
            np.testing.assert_array_equal(scale, other.scales[path], err_msg=path)


def test_all_experts_see_every_token_and_the_output_stays(model: Gemma4) -> None:
    """If it fails, calibrating changes the model it measures, or does not reach rarely chosen experts."""
    assert MOE.experts is not None
    everyone = dataclasses.replace(
        FITTED.config, experts=dataclasses.replace(MOE.experts, calls_all=True)
    )
    tokens = _batch(4)["tokens"]
    wide = Gemma4.from_parameters(everyone, model.parameters(), FITTED.plans)
    np.testing.assert_allclose(
        _run(wide, tokens)[0], _run(model, tokens)[0], atol=2e-5
    )  # sums over 8 experts, 6 of them 0
    routed = calibrate(model, [_batch(4)], CalibrationConfig(method="max", all_experts=False))
    every = calibrate(model, [_batch(4)], CalibrationConfig(method="max"))
    paths = [p for p in routed.scales if "/experts/" in p and p.endswith("output_scale")]
    larger = [bool(every.scales[p] > routed.scales[p] * 1.001) for p in paths]
    assert (
        len(paths) == 9
        and all(every.scales[p] >= routed.scales[p] * 0.999 for p in paths)
        and any(larger)
    )
    for layer, counts in routed.expert_tokens.items():
        assert counts.sum() == tokens.size * MOE.experts.per_token
        np.testing.assert_array_equal(counts, every.expert_tokens[layer])
    assert len(routed.coverage()) == 3 and "8 experts" in routed.coverage()[0]


@pytest.mark.slow
def test_padding_is_not_measured_and_logits_come_in_chunks(
    model: Gemma4, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it fails, scales depend on how full rows are, or all logits have to fit into memory at once."""
    batch = _batch(5)
    whole = {name: array[:, :12] for name, array in batch.items()}
    padded = dict(batch)
    padded["segments"] = batch["segments"].at[:, 12:].set(0)
    how = CalibrationConfig(method="mse", all_experts=False)
    expected = calibrate(model, [whole], how)
    # The package's `calibrate` is the function; chunks of 5 positions.
    monkeypatch.setattr(sys.modules[calibrate.__module__], "LOGITS", 2 * 64 * 5)
    found = calibrate(model, [padded], how)
    for path, scale in expected.scales.items():
        np.testing.assert_allclose(found.scales[path], scale, rtol=1e-3, err_msg=path)
    for layer, counts in expected.expert_tokens.items():
        np.testing.assert_array_equal(found.expert_tokens[layer], counts)


def test_a_recipe_with_static_scales_asks_for_text_before_it_starts() -> None:
    """If it fails, a packed model has activations without scales, or hours pass before it is said."""
    begun: list[str] = []
    with pytest.raises(InputError, match="recipe mobile_like rounds activations .* give text"):
        quantize_model({}, FITTED, progress=lambda name, done, total: begun.append(name))
    assert not begun


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rtn", "mse", "percentile"])
def test_a_whole_model_by_rounding_to_nearest(method: str) -> None:
    """If it fails, a packed model has codes of one method and activations of none."""
    reference = initialize(MOE, 0)
    measured: list[Calibrated] = []
    codes, floats = quantize_model(reference, FITTED, method, [_batch(1)], heard=measured.append)
    assert all(float(floats[path][0]) > 0 for path in static_scale_paths(FITTED.plans))
    tokens = _batch(1)["tokens"]
    logits, own = (
        _run(model, tokens)[0]
        for model in (packed_model(codes, floats, FITTED), Gemma4.from_parameters(MOE, reference))
    )
    assert 0 < float(jnp.abs(logits - own).mean()) < float(jnp.abs(own).mean())
    assert [len(found.coverage()) for found in measured] == [3]


def test_bad_calibration_is_one_line(model: Gemma4) -> None:
    with pytest.raises(InputError, match="no batches of text given"):
        calibrate(model, [])
    with pytest.raises(InputError, match=r"unknown calibration method 'mean'"):
        CalibrationConfig(method="mean")
    for name in ("batches", "batch_size"):
        with pytest.raises(InputError, match=rf"calibration\.{name}=0: at least 1"):
            CalibrationConfig(**{name: 0})
    poisoned = model.parameters()
    poisoned["layers/1/ffn/up/kernel"] = poisoned["layers/1/ffn/up/kernel"].at[0, 0].set(jnp.inf)
    with pytest.raises(InputError, match=r"calibration data made (nan|inf) here") as caught:
        calibrate(Gemma4.from_parameters(FITTED.config, poisoned, FITTED.plans), [_batch(1)])
    assert "\n" not in str(caught.value) and "_scale: " in str(caught.value)


def test_a_dead_site_is_an_error() -> None:
    """Zero weights make a site's output zero: it saw no data, and has no scale."""
    config: ModelConfig = FITTED.config
    parameters = FITTED.adopt(initialize(MOE, 0))
    dead = "layers/2/ffn/up/kernel"
    parameters[dead] = jnp.zeros(declare(config)[dead].shape)
    with pytest.raises(InputError, match=r"layers/2/ffn/(up|down)/kernel_\w+: saw no data"):
        calibrate(Gemma4.from_parameters(config, parameters, FITTED.plans), [_batch(1)])
