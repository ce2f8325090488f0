"""Activations in Q8_0 tiles reach every kind of contraction: plain weights, packed ones, experts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_qat.nn.contract import Weight, contract, contract_grouped
from gemma_qat.numerics import Grid, pack, quantize
from gemma_qat.quant import Activation, Plan
from gemma_qat.quant.activations import round_tiles

PLAN = Plan(weight=Grid(format="q4_0"), input=Activation(per="tile"))


@pytest.mark.parametrize("packed", [False, True])
def test_inputs_are_rounded_before_the_dot(packed: bool) -> None:
    """If it fails, `q4_0+q8_0_acts` is q4_0 somewhere, silently: when trained, or when packed."""
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.standard_normal((2, 3, 64)), jnp.float32)
    w = jnp.asarray(rng.standard_normal((64, 5)), jnp.float32)
    q = jax.jit(lambda w: quantize(w, PLAN.weight, (0,)))(w)
    leaf = jax.jit(pack)(q) if packed else w
    out = contract("BTD,DF->BTF", x, Weight("kernel", {"kernel": leaf}, (0,), PLAN))
    rounded = round_tiles(x, (2,))
    assert not np.array_equal(rounded, x)
    expected = np.asarray(rounded, np.float64) @ np.asarray(q.dequantize(), np.float64)
    np.testing.assert_allclose(out, expected, atol=1e-4)  # 64 float32 products of about 1


def test_experts_round_their_rows() -> None:
    """The same for rows sorted by expert."""
    rng = np.random.default_rng(5)
    x = jnp.asarray(rng.standard_normal((7, 64)), jnp.float32)
    w = jnp.asarray(rng.standard_normal((2, 64, 5)), jnp.float32)
    q = jax.jit(lambda w: quantize(w, PLAN.weight, (1,)))(w)
    weight = Weight("kernel", {"kernel": w}, (1,), PLAN)
    out = contract_grouped(x, weight, jnp.asarray([3, 4]))
    rounded = np.asarray(round_tiles(x, (1,)), np.float64)
    whole = np.asarray(q.dequantize(), np.float64)
    np.testing.assert_allclose(out[:3], rounded[:3] @ whole[0], atol=1e-4)
    np.testing.assert_allclose(out[3:], rounded[3:] @ whole[1], atol=1e-4)
