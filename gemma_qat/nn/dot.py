"""The float dot of a contraction, with its gradient written out.

    fwd     out  = round(lhs) . rhs                 rounding only where the plan has a static scale
    dlhs    dlhs = g . rhs, nothing where lhs saturated
    drhs    drhs = round(lhs) . g                   the smaller of the two is the one that is turned

These are the gradients that jax derives; two things about how they are computed are chosen here.

**Which operand of drhs is turned.** Both have tokens in front, and XLA brings the first operand's tokens to the back,
on CPU by a strided copy into which everything that made the operand is fused once more: of g, its whole activation
function and the mask of its rounding. jax names g first, the widest of all arrays in `D -> F` and in the head. Turning
the smaller operand took 23 % off a float step and 32 % off a `mobile` one (`experiments/step_cost`).

**What waits for the backward pass.** Only the unrounded lhs, which several contractions share (q, k and v; gate and up)
while each has rounded it by its own scale: drhs rounds again.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gemma_qat.quant.activations import round_again, round_static


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def dot(equation: str, lhs: Float[Array, "..."], rhs: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns the einsum of an activation and a weight of its dtype, float32.

    Shapes: as `equation` says; a letter is in two of its three terms.
    """
    return jnp.einsum(equation, lhs, rhs, preferred_element_type=jnp.float32)


def _forward(equation: str, lhs: jax.Array, rhs: jax.Array):
    return dot(equation, lhs, rhs), (lhs, rhs)


def _backward(equation: str, residuals, g: jax.Array):
    lhs, rhs = residuals
    return _d_lhs(equation, lhs, rhs, g), _d_rhs(equation, lhs, rhs, g)


dot.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 4))
def rounded_dot(
    equation: str,
    lhs: Float[Array, "..."],
    rhs: Float[Array, "..."],
    scale: Float[Array, "1"],
    highest: int,
) -> Float[Array, "..."]:
    """Returns `dot` of the activation rounded to a stored scale (`round_static`), float32.

    Exactness: value and gradients are those of the two functions one after the other, bit for bit up to the order of
    sums.
    """
    return dot(equation, round_static(lhs, scale, highest), rhs)


def _rounded_forward(equation: str, lhs: jax.Array, rhs: jax.Array, scale: jax.Array, highest: int):
    return rounded_dot(equation, lhs, rhs, scale, highest), (lhs, rhs, scale)


def _rounded_backward(equation: str, highest: int, residuals, g: jax.Array):
    lhs, rhs, scale = residuals
    _, pull = jax.vjp(lambda x, s: round_static(x, s, highest), lhs, scale)
    d_lhs, d_scale = pull(_d_lhs(equation, lhs, rhs, g))
    return d_lhs, _d_rhs(equation, round_again(lhs, scale, highest), rhs, g), d_scale


rounded_dot.defvjp(_rounded_forward, _rounded_backward)


def _terms(equation: str) -> tuple[str, str, str]:
    operands, out = equation.split("->")
    lhs, rhs = operands.split(",")
    return lhs, rhs, out


def _d_lhs(equation: str, lhs: jax.Array, rhs: jax.Array, g: jax.Array) -> jax.Array:
    left, right, out = _terms(equation)
    back = jnp.einsum(f"{out},{right}->{left}", g, rhs, preferred_element_type=jnp.float32)
    return back.astype(lhs.dtype)


def _d_rhs(equation: str, lhs: jax.Array, rhs: jax.Array, g: jax.Array) -> jax.Array:
    left, right, out = _terms(equation)
    (first, a), (second, b) = sorted(
        ((left, lhs), (out, g)), key=lambda term: math.prod(term[1].shape)
    )
    tokens = [letter for letter in left if letter in out]
    # Not an einsum: that would put the operands into the order that spares the transposition of the result.
    product = jax.lax.dot_general(
        a, b, (([first.index(t) for t in tokens], [second.index(t) for t in tokens]), ((), ())),
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    made = [letter for letter in first + second if letter not in tokens]
    return jnp.transpose(product, [made.index(letter) for letter in right]).astype(rhs.dtype)
