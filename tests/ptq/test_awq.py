"""AWQ: what is folded leaves the float model as it was, and what is searched for is no worse than nothing."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_qat.models import Gemma4, Layerwise, declare, size_named
from gemma_qat.numerics import Grid, mse_search, quantize
from gemma_qat.ptq import awq
from gemma_qat.ptq.layer import Seen

SIZES = (
    "tiny_e2b", "tiny_26b_a4b",
    *(pytest.param(size, marks=pytest.mark.slow) for size in ("tiny_12b", "tiny_e4b", "tiny_31b")),
)  # fmt: skip


def _parameters(size: str) -> dict[str, jax.Array]:
    """Parameters whose norm weights differ from channel to channel."""
    rng, found = np.random.default_rng(3), {}
    for path, leaf in declare(size_named(size)).items():
        drawn = rng.standard_normal(leaf.shape)
        factor = np.exp(0.5 * drawn) if leaf.role == "norm" else drawn
        value = np.ones(leaf.shape) if leaf.role == "scalar" else leaf.init_scale * factor
        found[path] = jnp.asarray(value, jnp.float32)
    return found


def _logits(size: str, *versions: dict[str, Any]) -> list[np.ndarray]:
    """Logits of the same tokens with each version of the parameters; one program."""
    config = size_named(size)
    tokens = np.random.default_rng(5).integers(0, config.vocab_size, (2, 16), dtype=np.int32)
    run = jax.jit(lambda p: Gemma4.from_parameters(config, p)(jnp.asarray(tokens)))
    return [np.asarray(run(parameters)) for parameters in versions]


@pytest.mark.parametrize("size", SIZES)
def test_folded_scales_leave_the_float_model_alone(size: str) -> None:
    """If it fails, scaling changes what the model computes: a reader of a norm was forgotten."""
    config, parameters = size_named(size), _parameters(size)
    walk, rng, changed = Layerwise(config), np.random.default_rng(7), dict(parameters)
    for index in range(config.layers):
        leaves = walk.leaves_of(parameters, index)
        for fold in awq.FOLDS:
            if fold.behind not in leaves:
                continue
            first = leaves[fold.into[0]]
            shape = first.shape[:1]
            if first.ndim == 3 and fold.into[0].startswith("experts"):
                shape = first.shape[1:2] if "norm" in fold.behind else first.shape[:2]
            scale = jnp.asarray(np.exp(rng.standard_normal(shape)), jnp.float32)
            leaves |= awq.folded(leaves, fold, scale)
        changed |= {f"layers/{index}/{name}": leaf for name, leaf in leaves.items()}
    kinds = {
        path.split("/", 2)[2]
        for path in parameters
        if not np.array_equal(parameters[path], changed[path])
    }
    assert {"attn/q/kernel", "ffn/gate/kernel", "ffn/down/kernel", "pre_attn_norm/weight"} <= kinds
    assert ("experts/down/kernel" in kinds) == (config.experts is not None)
    before, after = _logits(size, parameters, changed)
    assert np.abs(after - before).max() < 2e-4 * np.abs(before).max()


def test_values_cannot_be_scaled_before_their_norm() -> None:
    """If it fails, v could be folded into o after all: a scale of v's outputs would pass the norm of values."""
    config, parameters = size_named("tiny_e2b"), _parameters("tiny_e2b")
    v, o = "layers/0/attn/v/kernel", "layers/0/attn/o/kernel"
    scale = jnp.asarray(np.exp(np.random.default_rng(9).standard_normal(parameters[v].shape[2])))
    assert parameters[v].shape[1] == 1
    changed = parameters | {
        v: parameters[v] / scale[None, None, :],
        o: parameters[o] * scale[None, :, None],
    }
    before, after = _logits("tiny_e2b", parameters, changed)
    assert np.abs(after - before).max() > 0.01 * np.abs(before).max()
    assert config.layer_shape(0).owns_value


def _error(w: np.ndarray, scale: np.ndarray, moments: np.ndarray, grid: Grid) -> float:
    """tr(d^T H d) in float64 of the codes that `mse` with importance gives for scaled weights [R, O]."""
    importance = jnp.asarray(np.diagonal(moments) / scale**2, jnp.float32)
    scaled = jnp.asarray(w * scale[:, None], jnp.float32)
    q = quantize(scaled, grid, (0,), mse_search(scaled, grid, (0,), importance=importance))
    d = np.asarray(q.dequantize(), np.float64) / scale[:, None] - w
    return float(np.trace(d.T @ moments @ d))


@pytest.mark.parametrize("full", [True, False])
def test_scales_are_no_worse_than_none_and_help_inputs_that_matter(full: bool) -> None:
    """If it fails, AWQ loses to the search that it stands on, or finds nothing where a few inputs are everything."""
    rng, grid = np.random.default_rng(11), Grid(format="int4", tile=32)
    for spread in (0.0, 2.0):
        x = rng.standard_normal((400, 64)) * np.exp(spread * rng.standard_normal(64))
        w = rng.standard_normal((64, 24))
        moments = x.T @ x / len(x)
        kept = moments if full else np.diagonal(moments)
        seen = Seen(moments=jnp.asarray(kept, jnp.float32), tokens=jnp.asarray(400.0))
        scale = awq.best_scale([(jnp.asarray(w, jnp.float32), grid, (0,), seen)], own=True)
        judge = moments if full else np.diag(np.diagonal(moments))
        found = _error(w, np.asarray(scale, np.float64), judge, grid)
        nothing = _error(w, np.ones(64), judge, grid)
        assert found <= nothing * (1 + 1e-5)
        if spread:
            assert found < 0.85 * nothing  # 0.78 of it here


def test_experts_share_the_scale_of_a_norm_and_have_their_own_behind_up() -> None:
    """If it fails, an expert's scale is picked by another's tokens, or one norm is asked for several scales."""
    rng, grid = np.random.default_rng(13), Grid(format="int4", tile=32)
    w = jnp.asarray(rng.standard_normal((3, 64, 8)), jnp.float32)
    importance = np.exp(3 * rng.standard_normal((3, 64)))
    importance[1] = 1.0
    seen = Seen(moments=jnp.asarray(importance, jnp.float32), tokens=jnp.asarray([90.0, 60.0, 0.0]))
    own = awq.best_scale([(w, grid, (1,), seen)], own=True)
    assert own.shape == (3, 64)
    np.testing.assert_array_equal(own[1], np.ones(64))
    alone = Seen(moments=seen.moments[0], tokens=seen.tokens[0])
    expected = awq.best_scale([(w[0], grid, (0,), alone)], own=True)
    np.testing.assert_allclose(own[0], expected, rtol=1e-6)
    shared = awq.best_scale([(w, grid, (1,), seen)], own=False)
    assert shared.shape == (64,)
    # What no token chose has no say: its most important input does not stand out.
    mean = (90 * importance[0] + 60 * importance[1]) / 150
    assert np.corrcoef(np.log(shared), np.log(mean))[0, 1] > 0.999
