"""What a plan says around a weight happens in the contraction: by value, by gradient, and by the program's own text."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_qat.nn.contract import Weight, contract, contract_grouped
from gemma_qat.nn.taps import Statistics
from gemma_qat.numerics import Grid, pack, quantize
from gemma_qat.quant import Activation, Plan
from gemma_qat.quant.activations import round_dynamic, round_static
from gemma_qat.quant.plan import summing_codes

RNG = np.random.default_rng(11)
W = jnp.asarray(RNG.standard_normal((2, 3, 5)) / 2, jnp.float32)  # heads, head, width
X = jnp.asarray(RNG.standard_normal((1, 7, 2, 3)), jnp.float32)
STATIC = Plan(weight=Grid(format="int4"), input=Activation(), output=Activation())
TOKEN = Plan(weight=Grid(format="int8"), input=Activation(per="token"), arithmetic="integer")
SCALES = {"input_scale": jnp.asarray([0.02]), "output_scale": jnp.asarray([0.03])}


def _weight(plan: Plan, leaf: Any = W, reduced: tuple[int, ...] = (0, 1), **scales: Any) -> Weight:
    found = {f"kernel_{name}": scale for name, scale in (SCALES | scales).items()}
    return Weight("kernel", {"kernel": leaf} | found, reduced, plan)


def test_static_rounding_before_and_after() -> None:
    """Against the three steps written out; if it fails, a site's input or output stays in float."""
    w = quantize(W, STATIC.weight, (0, 1)).dequantize()
    x = round_static(X, SCALES["input_scale"], 127)
    expected = round_static(jnp.einsum("BTNH,NHD->BTD", x, w), SCALES["output_scale"], 127)
    np.testing.assert_allclose(
        contract("BTNH,NHD->BTD", X, _weight(STATIC)), expected, atol=1e-6
    )  # one step is 0.03
    assert not np.allclose(expected, jnp.einsum("BTNH,NHD->BTD", X, w), atol=0.01)


def test_statistics_are_kept_for_static_scales_only() -> None:
    seen = Statistics()
    contract("BTNH,NHD->BTD", X, _weight(STATIC, input_scale=jnp.zeros(1)), seen)
    assert seen.keys() == {"kernel_input_scale", "kernel_output_scale"}
    assert float(seen["kernel_input_scale"]["largest"]) == float(jnp.abs(X).max())
    assert int(seen["kernel_output_scale"]["histogram"].sum()) == 7 * 5
    none = Statistics()
    contract("BTNH,NHD->BTD", X, _weight(TOKEN), none)
    assert none == {}


def test_learned_static_scales_have_a_gradient_and_frozen_ones_none() -> None:
    learned = dataclasses.replace(STATIC, input=Activation(learned=True))

    def loss(scale: jax.Array, plan: Plan) -> jax.Array:
        return jnp.sum(jnp.square(contract("BTNH,NHD->BTD", X, _weight(plan, input_scale=scale))))

    scale = SCALES["input_scale"]
    assert float(jax.grad(loss)(scale, STATIC)[0]) == 0.0
    assert float(jax.grad(loss)(scale, learned)[0]) != 0.0


def test_integer_dots_are_integer_dots() -> None:
    """If it fails, a recipe that promises int8 x int8 -> int32 multiplies floats."""
    text = str(jax.make_jaxpr(lambda x: contract("BTNH,NHD->BTD", x, _weight(TOKEN)))(X))
    assert text.count("dot_general[") == text.count("preferred_element_type=int32") == 1
    codes, scale = (round_dynamic(X, (2, 3), 127)[i] for i in (1, 2))
    q = quantize(W, TOKEN.weight, (0, 1))
    sums = np.einsum("BTNH,NHD->BTD", np.asarray(codes, np.int64), np.asarray(q.codes, np.int64))
    by_hand = sums * np.asarray(scale, np.float64)[:, :, 0] * np.asarray(q.scale, np.float64)[0]
    np.testing.assert_allclose(contract("BTNH,NHD->BTD", X, _weight(TOKEN)), by_hand, rtol=5e-7)


@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_trained_is_what_is_served(bits: int) -> None:
    """The training forward on masters and the packed one on stored codes: equal bits."""
    plan = dataclasses.replace(TOKEN, weight=Grid(format=f"int{bits}"))
    stored = jax.jit(lambda w: pack(quantize(w, plan.weight, (0, 1))))(W)
    train = jax.jit(lambda w, x: contract("BTNH,NHD->BTD", x, _weight(plan, w)))(W, X)
    serve = jax.jit(lambda w, x: contract("BTNH,NHD->BTD", x, _weight(plan, w)))(stored, X)
    np.testing.assert_array_equal(train, serve)


@pytest.mark.parametrize("grouped", [False, True], ids=["dense", "experts"])
def test_codes_of_packed_weights_are_summed(grouped: bool) -> None:
    """Static inputs: the float dot's value up to float32 sums, its gradient, and int32 products in the program."""
    plan = summing_codes({"": dataclasses.replace(STATIC, output=None)})[""]
    w = jnp.asarray(RNG.standard_normal((3, 8, 5) if grouped else (8, 5)), jnp.float32)
    reduced, sizes = ((1,), jnp.asarray([4, 0, 5])) if grouped else ((0,), None)
    rows = jnp.asarray(RNG.standard_normal((9, 8)), jnp.float32)
    packed = pack(quantize(w, plan.weight, reduced))

    def made(rows: jax.Array, leaf: Any) -> jax.Array:
        weight = _weight(plan, leaf, reduced)
        if sizes is None:
            return contract("MR,RO->MO", rows, weight)
        return contract_grouped(rows, weight, sizes)

    text = str(jax.make_jaxpr(made)(rows, packed))
    assert "int32" in text and "preferred_element_type=int32" in text
    np.testing.assert_allclose(made(rows, packed), made(rows, w), atol=8 * 2.0**-22)  # |y| < 8
    g = jnp.asarray(RNG.standard_normal((9, 5)), jnp.float32)
    back, trained_back = (jax.vjp(lambda x: made(x, leaf), rows)[1](g)[0] for leaf in (packed, w))
    np.testing.assert_allclose(back, trained_back, atol=8 * 2.0**-22)


@pytest.mark.parametrize("plan", [STATIC, TOKEN], ids=["static", "integer"])
def test_experts_equal_each_expert_alone(plan: Plan) -> None:
    """If it fails, an expert is rounded with another expert's scale, or sees another's tokens."""
    weights = jnp.asarray(RNG.standard_normal((3, 8, 5)), jnp.float32)
    rows = jnp.asarray(RNG.standard_normal((9, 8)), jnp.float32)
    sizes = jnp.asarray([4, 0, 5], jnp.int32)

    def grouped(rows: jax.Array, w: jax.Array) -> jax.Array:
        return contract_grouped(rows, _weight(plan, w, (1,)), sizes)

    def alone(rows: jax.Array, w: jax.Array) -> jax.Array:
        parts = [(rows[:4], w[0]), (rows[4:], w[2])]
        out = [contract("CD,DF->CF", x, _weight(plan, one, (0,))) for x, one in parts]
        return jnp.concatenate(out)

    got, back = jax.vjp(grouped, rows, weights)
    expected, back_alone = jax.vjp(alone, rows, weights)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    g = jnp.asarray(RNG.standard_normal(got.shape), jnp.float32)
    for ours, theirs in zip(back(g), back_alone(g), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)  # sums of at most nine products
