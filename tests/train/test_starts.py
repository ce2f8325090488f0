"""Where a run begins: schedules that start in float, retained scales, learned and frozen ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from gemma_qat.checkpoint.native import manifest_of, save_packed
from gemma_qat.config import ExperimentConfig
from gemma_qat.errors import InputError
from gemma_qat.models import (
    Fitted,
    ModelConfig,
    fit,
    float_parameters,
    initialize,
    quantize_parameters,
    static_scale_paths,
)
from gemma_qat.models.capture import differing
from gemma_qat.numerics import Grid
from gemma_qat.quant import scale_path
from gemma_qat.start import _retained_start, retained
from gemma_qat.train import OptimizerConfig, TrainConfig, Trained, train, with_scales

CONFIG = ModelConfig(
    name="three layers", layer_kinds=("sliding", "sliding", "full"), vocab_size=64, width=32, query_heads=2,
    kv_heads=1, global_kv_heads=1, head_width=16, global_head_width=32, ffn_width=32, window=4, max_positions=64,
)  # fmt: skip
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, scale_learning_rate=1e-2, warmup=1)

pytestmark = pytest.mark.usefixtures("quick_to_compile")


@pytest.fixture
def run(batches: Any) -> Callable[..., Trained]:
    def begin(
        model: Fitted | ModelConfig, parameters: Any, rate: float = 1e-3, **changes: Any
    ) -> Trained:
        how = TrainConfig(**({"steps": 4, "batch_size": 2, "log_every": 1} | changes))
        optimizer = dataclasses.replace(OPTIMIZER, learning_rate=rate)
        return train(model, parameters, batches(), how, optimizer)

    return begin


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    return initialize(CONFIG, 0)


@pytest.mark.slow
def test_a_run_that_begins_in_float_equals_a_float_run_until_then(
    reference: Any, run: Any, batches: Any
) -> None:
    """If it fails, `weights_from` and `activations_from` do not hold rounding back, or hold back more."""
    fitted = fit(CONFIG, "mobile_like", scales="learned")
    start = with_scales(reference, fitted, "mse", batches())
    floats = dataclasses.replace(CONFIG, ties_head=False)
    own = {
        path: leaf
        for path, leaf in fitted.adopt(reference).items()
        if path not in static_scale_paths(fitted.plans)
    }
    plain = run(floats, own).curves["loss"]
    late = run(fitted, start, weights_from=2, activations_from=3).curves["loss"]
    np.testing.assert_allclose([v for _, v in late[:2]], [v for _, v in plain[:2]], rtol=1e-5)
    assert abs(late[2][1] - plain[2][1]) > 1e-3
    both = [TrainConfig(weights_from=2, activations_from=3).phase(step) for step in range(5)]
    assert [phase.quantize for phase in both] == ["none", "none", "weights", "all", "all"]
    slow = TrainConfig(weights_from=1, blend_steps=2)
    assert [slow.phase(step).blends for step in range(4)] == [False, True, True, False]


@pytest.mark.parametrize(
    ("scales", "learn"), [pytest.param("learned", True, marks=pytest.mark.slow), ("frozen", False)]
)
def test_learned_scales_move_and_frozen_ones_stay(
    reference: Any, run: Any, batches: Any, scales: Any, learn: bool
) -> None:
    """Static scales as calibrated unless they are to learn; weights' frozen scales never move."""
    fitted = fit(CONFIG, "mobile_like", scales=scales, learn_activations=learn)
    start = with_scales(reference, fitted, "mse", batches())
    after = run(fitted, start, steps=2).parameters
    names = static_scale_paths(fitted.plans) + [scale_path(path) for path in fitted.plans]
    moved = [not np.array_equal(start[name], after[name]) for name in names]
    assert np.mean(moved) > 0.95 if learn else not any(moved)
    assert not np.array_equal(start["layers/0/ffn/up/kernel"], after["layers/0/ffn/up/kernel"])


def test_a_packed_checkpoint_is_fine_tuned_on_its_own_scales(
    reference: Any, run: Any, batches: Any, tmp_path: Path
) -> None:
    """Retained scales: the first forward has the stored codes, and training keeps the scales it came with."""
    plain = fit(CONFIG, "mobile_like")
    start = with_scales(reference, plain, "mse", batches())
    codes = quantize_parameters(start, plain)
    save_packed(tmp_path / "released", codes, float_parameters(start, plain), plain, imported=True)
    frozen = fit(CONFIG, "mobile_like", scales="frozen")
    masters = retained(tmp_path / "released", frozen)
    assert differing(quantize_parameters(masters, frozen), codes) == {"codes": 0, "scales": 0}
    after = run(frozen, masters, rate=0.1, steps=2).parameters
    again = quantize_parameters(after, frozen)
    for path, q in codes.items():
        np.testing.assert_array_equal(again[path].scale, q.scale)
    assert sum(int((again[p].codes != codes[p].codes).sum()) for p in codes) > 0
    # Zero means identity in what was imported: no text is asked for, nothing is measured, and saves go on saying so.
    identity = "layers/0/ffn/up/kernel_output_scale"
    released = float_parameters(start, plain) | {identity: jnp.zeros(1)}
    save_packed(tmp_path / "zero", codes, released, plain, imported=True)
    config = ExperimentConfig(
        name="x", model="three", recipe="mobile_like", scales="frozen", start=str(tmp_path / "zero")
    )
    fitted, found = _retained_start(config, tmp_path / "zero", frozen)
    assert float(with_scales(found, fitted, "mse")[identity][0]) == 0
    assert manifest_of(fitted, 1).imported
    with pytest.raises(InputError, match="scales=recomputed would drop the scales"):
        changed = dataclasses.replace(config, scales="recomputed")
        _retained_start(changed, tmp_path / "zero", frozen)
    finer = dataclasses.replace(frozen.plans["head/table"], weight=Grid(format="int8"))
    with pytest.raises(InputError, match="by mobile_like on other grids than those of mobile_like"):
        others = dataclasses.replace(frozen, plans=frozen.plans | {"head/table": finer})
        retained(tmp_path / "released", others)


def test_scales_that_are_there_are_kept(reference: Any, batches: Any) -> None:
    fitted = fit(CONFIG, "mobile_like", scales="learned")
    path = "layers/0/attn/k/kernel_key_cache_scale"
    given = reference | {
        path: jnp.asarray([0.25]),
        "layers/1/attn/q/kernel_scale": jnp.full((1, 2, 16), 0.5),
    }
    start = with_scales(given, fitted, "percentile", batches())
    np.testing.assert_array_equal(start[path], [0.25])
    np.testing.assert_array_equal(start["layers/1/attn/q/kernel_scale"], np.full((1, 2, 16), 0.5))
    with pytest.raises(InputError, match="static scales: give text"):
        with_scales(reference, fitted, "mse")
