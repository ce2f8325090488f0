"""The dot with its gradient written out: against the one that jax derives, for every equation a layer uses."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_qat.nn.dot import dot, rounded_dot
from gemma_qat.quant.activations import round_static

SIZES = dict(zip("BTDFNHPVL", (2, 3, 7, 11, 2, 5, 3, 13, 2), strict=True))
EQUATIONS = ("BTD,DF->BTF", "BTF,FD->BTD", "BTD,DNH->BTNH", "BTNH,NHD->BTD", "BTD,VD->BTV", "BTD,DLP->BTLP")  # fmt: skip


def _operands(equation: str, dtype: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(3)
    left, right = equation.split("->")[0].split(",")
    terms = (left, right, equation.split("->")[1])
    shapes = [tuple(SIZES[letter] for letter in term) for term in terms]
    x, w, g = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)
    return x, w, g.astype(jnp.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("equation", EQUATIONS)
def test_gradients_are_those_that_jax_derives(equation: str, dtype: str) -> None:
    """If it fails, weights or activations get another gradient than that of the dot they were in."""
    x, w, g = _operands(equation, dtype)
    scale = jnp.asarray([0.02], jnp.float32)  # 127 * 0.02: some saturate

    def plain(x: jax.Array, w: jax.Array, scale: jax.Array) -> jax.Array:
        x = round_static(x, scale, 127)
        return jnp.einsum(equation, x, w, preferred_element_type=jnp.float32)

    expected, back = jax.vjp(plain, x, w, scale)
    got, ours = jax.vjp(lambda x, w, s: rounded_dot(equation, x, w, s, 127), x, w, scale)
    np.testing.assert_array_equal(got, expected)
    # Sums of at most 26 float32 products in another order; then one rounding to bfloat16.
    rtol, atol = (1e-5, 1e-5) if dtype == "float32" else (2.0**-7, 1e-5)
    for one, other in zip(ours(g), back(g), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one.astype(jnp.float32), other.astype(jnp.float32), rtol, atol)
    assert int(jnp.sum(ours(g)[0] == 0)) > 0  # what saturated gets nothing
    np.testing.assert_array_equal(dot(equation, round_static(x, scale, 127), w), expected)


def test_the_smaller_operand_is_turned() -> None:
    """If it fails, XLA on CPU copies the widest array of a layer against the grain, fused with all that made it."""
    for equation, first in (("BTD,DF->BTF", 7), ("BTF,FD->BTD", 7), ("BTD,VD->BTV", 7)):
        x, w, g = _operands(equation, "float32")
        text = jax.make_jaxpr(lambda x, w, g, e=equation: jax.vjp(lambda v: dot(e, x, v), w)[1](g))
        dots = [e for e in text(x, w, g).eqns if e.primitive.name == "dot_general"]
        assert dots[-1].invars[0].aval.shape == (2, 3, first)
