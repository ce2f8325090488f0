"""Routing and experts against a dense reference written here: if these fail, tokens are dropped or mixed up."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_qat.nn.contract import Weight, contract, contract_grouped
from gemma_qat.nn.moe import Experts, Router
from gemma_qat.nn.shapes import ExpertsShape
from gemma_qat.nn.taps import Loads, under
from gemma_qat.numerics import Grid
from gemma_qat.quant import Plan, ScaleMode

SHAPE = ExpertsShape(count=5, per_token=2, width=7)
WIDTH = 11
RNG = np.random.default_rng(0)


def _leaves() -> dict[str, dict[str, jax.Array]]:
    shapes = {"gate": (5, WIDTH, 7), "up": (5, WIDTH, 7), "down": (5, 7, WIDTH)}
    return {
        name: {"kernel": jnp.asarray(RNG.standard_normal(shape) / 3, jnp.float32)}
        for name, shape in shapes.items()
    }


def _dense(leaves: Any, y: jax.Array, chosen: jax.Array, weights: jax.Array) -> jax.Array:
    """Every expert on every token, weighted by a one-hot sum."""
    share = jnp.einsum("BTXE,BTX->BTE", jax.nn.one_hot(chosen, 5), weights)
    inside = jnp.einsum("BTD,EDF->BTEF", y, leaves["gate"]["kernel"])
    cubic = 0.7978845608 * (inside + 0.044715 * inside**3)
    hidden = (
        0.5
        * inside
        * (1 + jnp.tanh(cubic))
        * jnp.einsum("BTD,EDF->BTEF", y, leaves["up"]["kernel"])
    )
    return jnp.einsum("BTEF,EFD,BTE->BTD", hidden, leaves["down"]["kernel"], share)


CHOICES = {
    "spread": np.stack([RNG.permutation(5)[:2] for _ in range(26)]),
    "all to one": np.tile([3, 1], (26, 1)),
    "some experts empty": np.stack([RNG.permutation([0, 4])[:2] for _ in range(26)]),
}


@pytest.mark.parametrize("name", CHOICES)
def test_experts_equal_the_dense_reference(name: str) -> None:
    """Values, and gradients to input, weights and matrices; with all tokens on one expert none is dropped."""
    leaves = _leaves()
    chosen = jnp.asarray(CHOICES[name].reshape(2, 13, 2), jnp.int32)
    y = jnp.asarray(RNG.standard_normal((2, 13, WIDTH)), jnp.float32)
    weights = jnp.asarray(RNG.uniform(0.2, 1.5, (2, 13, 2)), jnp.float32)

    def ours(leaves: Any, y: jax.Array, weights: jax.Array) -> jax.Array:
        return Experts(SHAPE, leaves, {})(y, chosen, weights)

    def theirs(leaves: Any, y: jax.Array, weights: jax.Array) -> jax.Array:
        return _dense(leaves, y, chosen, weights)

    want = theirs(leaves, y, weights)
    assert (np.abs(want).max(axis=-1) > 1e-3).all()
    np.testing.assert_allclose(ours(leaves, y, weights), want, atol=2e-5)
    gradients = [
        jax.jit(jax.grad(lambda *args, f=f: jnp.sum(jnp.sin(f(*args))), (0, 1, 2)))(
            leaves, y, weights
        )
        for f in (ours, theirs)
    ]
    for got, wanted in zip(*map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_allclose(got, wanted, atol=5e-5)


@pytest.mark.parametrize("scales", ["recomputed", "learned"])
@pytest.mark.parametrize(
    "grid", [Grid(format="q4_0"), Grid(format="int4", tile=32)], ids=lambda grid: grid.format
)
def test_quantized_experts_equal_each_expert_alone(grid: Grid, scales: ScaleMode) -> None:
    """Tiles of 32 inside the grouped contraction: values and gradients are those of plain contractions."""
    plan = Plan(weight=grid, scales=scales)
    sizes = (3, 0, 6)
    leaves = {"kernel": jnp.asarray(RNG.standard_normal((3, 64, 4)), jnp.float32)}
    if plan.has_scale_leaf:
        leaves["kernel_scale"] = jnp.asarray(RNG.uniform(0.1, 0.3, (3, 2, 4)), jnp.float32)
    rows = jnp.asarray(RNG.standard_normal((1, 9, 64)), jnp.float32)

    def together(leaves: Any, rows: jax.Array) -> jax.Array:
        return contract_grouped(rows[0], Weight("kernel", leaves, (1,), plan), jnp.asarray(sizes))

    def alone(leaves: Any, rows: jax.Array) -> jax.Array:
        ends = np.cumsum(sizes)
        one = [jax.tree.map(lambda leaf, e=e: leaf[e], leaves) for e in range(3)]
        parts = [
            contract("BTD,DF->BTF", rows[:, end - size : end], Weight("kernel", leaf, (0,), plan))
            for leaf, size, end in zip(one, sizes, ends, strict=True)
        ]
        return jnp.concatenate(parts, axis=1)[0]

    found, expected = (
        jax.jit(jax.value_and_grad(lambda *a, f=f: jnp.sum(jnp.sin(f(*a))), (0, 1)))(leaves, rows)
        for f in (together, alone)
    )
    # Sums of 64 float32 products in another order: 64 x 2^-24 of some 10.
    for got, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, wanted, atol=5e-5)
    assert np.abs(jax.tree.leaves(found)[1]).max() > 0.1


def _router_leaves() -> dict[str, Any]:
    return {
        "proj": {"kernel": jnp.asarray(RNG.standard_normal((WIDTH, 5)), jnp.float32)},
        "scale": jnp.asarray(RNG.uniform(0.5, 2, WIDTH), jnp.float32),
        "per_expert_scale": jnp.asarray(RNG.uniform(0.5, 2, 5), jnp.float32),
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_router_by_hand_and_in_float32(dtype: str) -> None:
    """In a bfloat16 model only its input is bfloat16; weights rounded anywhere inside would be off by 1e-3."""
    leaves = _router_leaves()
    x = jnp.asarray(RNG.standard_normal((2, 13, WIDTH)), dtype)
    chosen, weights = Router(SHAPE, 1e-6, leaves, {})(x)
    wide = np.asarray(x.astype(jnp.float32), np.float64)
    normal = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6)
    logits = (normal * np.asarray(leaves["scale"], np.float64) * WIDTH**-0.5) @ np.asarray(
        leaves["proj"]["kernel"], np.float64
    )
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    order = np.argsort(-p, axis=-1)[..., :2]
    np.testing.assert_array_equal(chosen, order)
    top = np.take_along_axis(p, order, -1)
    want = top / top.sum(-1, keepdims=True) * np.asarray(leaves["per_expert_scale"])[order]
    assert weights.dtype == jnp.float32
    np.testing.assert_allclose(weights, want, rtol=1e-5)


def test_ties_go_to_the_first_experts_and_stay_finite() -> None:
    leaves = _router_leaves() | {
        "proj": {"kernel": jnp.zeros((WIDTH, 5))},
        "per_expert_scale": jnp.ones(5),
    }
    chosen, weights = Router(SHAPE, 1e-6, leaves, {})(jnp.zeros((1, 3, WIDTH)))
    np.testing.assert_array_equal(chosen[0], [[0, 1]] * 3)
    np.testing.assert_allclose(weights, 0.5)


def test_loads_count_the_tokens_of_every_expert_and_nothing_else() -> None:
    """What the training step reports; if it listened to more, it would keep activations."""
    leaves, loads = _router_leaves(), Loads()
    inner = Loads()
    Router(SHAPE, 1e-6, leaves, {})(jnp.ones((2, 3, WIDTH)), inner)
    under(loads, "layers/0/router", inner)
    assert set(loads) == {"layers/0/router/tokens"}
    assert int(loads["layers/0/router/tokens"].sum()) == 2 * 3 * 2
    metrics = {name: float(value) for name, value in loads.metrics().items()}
    assert metrics == {
        "expert_load_max": 6.0,
        "expert_load_mean": pytest.approx(12 / 5),
        "experts_idle": pytest.approx(3 / 5),
    }
    assert Loads().metrics() == {}
