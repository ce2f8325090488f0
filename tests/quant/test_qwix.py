"""Weights against Qwix (google/qwix), the JAX library most of its readers come from.

Qwix divides by absmax / (2^bits - 1) * 2, so by 7.5 and 127.5, and multiplies nothing: it divides weights by their
scale. Ours multiplies by the reciprocal, which moves exact ties; the draws here have none but the extremum itself, whose
7.5 Qwix rounds to 8 and clips, as ours does. Its codes reach -8, as ours do.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_qat.numerics import Grid, quantize
from gemma_qat.quant import fake_quantize

CASES = [("int4", 7.5, None), ("int8", 127.5, None), ("int4", 7.5, 32), ("int8", 127.5, 32)]


@pytest.mark.parametrize(("name", "divisor", "tile"), CASES)
@pytest.mark.parametrize("shape", [(64, 37), (5, 64, 11)], ids=["dense", "experts"])
def test_codes_scales_and_contraction(
    name: str, divisor: float, tile: int | None, shape: tuple[int, ...]
) -> None:
    """If it fails, a model trained here and one trained with Qwix on the same words are on different grids."""
    from qwix._src.core import qarray

    rng = np.random.default_rng(17)
    w = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    axis = len(shape) - 2
    lead = tuple(i for i in range(len(shape)) if i != axis)
    how = qarray.HowToQuantize(
        qtype=name, channelwise_axes=lead, tiled_axes={} if tile is None else {axis: tile}
    )
    theirs = qarray.quantize(w, how)
    ours = jax.jit(lambda w: quantize(w, Grid(format=name, tile=tile, divisor=divisor), (axis,)))(w)
    # Both are absmax / divisor, once as a quotient and once as a product with the reciprocal: one rounding apart.
    np.testing.assert_allclose(ours.scale, theirs.scale.reshape(ours.scale.shape), rtol=1.2e-7)
    assert int((np.asarray(ours.codes) != np.asarray(theirs.qvalue, np.int8)).sum()) == 0
    np.testing.assert_allclose(ours.dequantize(), qarray.dequantize(theirs), rtol=2.4e-7)
    x = jnp.asarray(rng.standard_normal((3, shape[axis])), jnp.float32)
    equation = "CD,EDF->ECF" if len(shape) == 3 else "CD,DF->CF"

    def product(x: jax.Array, w: jax.Array) -> jax.Array:
        fake, _ = fake_quantize(w, Grid(format=name, tile=tile, divisor=divisor), (axis,))
        return jnp.einsum(equation, x, fake)

    got, back = jax.vjp(product, x, w)
    expected = jnp.einsum(equation, x, qarray.dequantize(theirs))
    np.testing.assert_allclose(got, expected, atol=1e-5)  # 64 float32 products of size 1
    g = jnp.asarray(rng.standard_normal(got.shape), jnp.float32)
    dw = jax.vjp(lambda w: jnp.einsum(equation, x, w), w)[1](g)[0]
    np.testing.assert_array_equal(back(g)[1], dw)  # straight through
