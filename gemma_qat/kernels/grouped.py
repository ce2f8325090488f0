"""Rows times the matrices of their experts, in floating point, and its gradient.

    out[c]     = rows[c] @ matrices[e(c)]             one product a row
    d_rows[c]  = d_out[c] @ matrices[e(c)]^T          the same, turned
    d_matrices[e] = sum over c of e: rows[c]^T d_out[c]

The first two are `jax.lax.ragged_dot` everywhere. So is the third, but on TPU: there its compiler writes it as a
masked product of all rows with every expert, E times the work. A Pallas kernel does it there
(`tpu_grouped_gradient.py`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gemma_qat.kernels import tpu_grouped_gradient


@jax.custom_vjp
def grouped_dot(
    rows: Float[Array, "C R"], matrices: Float[Array, "E R O"], group_sizes: Int[Array, "E"]
) -> Float[Array, "C O"]:
    """Returns each row times the matrix of its group, summed and returned in float32.

    Shapes: rows [C, R] sorted by group, `group_sizes` [E] rows of each; what becomes of rows past their sum is not
    defined, and their gradient reaches no matrix.
    Exactness: the gradient is that of `jax.lax.ragged_dot`; on TPU that of the matrices up to the order of sums.
    """
    return jax.lax.ragged_dot(rows, matrices, group_sizes, preferred_element_type=jnp.float32)


def _forward(rows: jax.Array, matrices: jax.Array, group_sizes: jax.Array):
    return grouped_dot(rows, matrices, group_sizes), (rows, matrices, group_sizes)


def _backward(saved: tuple[jax.Array, jax.Array, jax.Array], d_out: jax.Array):
    rows, matrices, group_sizes = saved

    def product(rows: jax.Array, matrices: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot(rows, matrices, group_sizes, preferred_element_type=jnp.float32)

    _, to_rows = jax.vjp(lambda rows: product(rows, matrices), rows)

    def by_ragged_dot(rows: jax.Array, d_out: jax.Array, group_sizes: jax.Array) -> jax.Array:
        del group_sizes
        _, to_matrices = jax.vjp(lambda matrices: product(rows, matrices), matrices)
        return to_matrices(d_out)[0]

    like = jax.eval_shape(by_ragged_dot, rows, d_out, group_sizes)

    def by_kernel(rows: jax.Array, d_out: jax.Array, group_sizes: jax.Array) -> jax.Array:
        return tpu_grouped_gradient.outer_products(rows, d_out, group_sizes, like)

    d_matrices = jax.lax.platform_dependent(
        rows, d_out, group_sizes, tpu=by_kernel, default=by_ragged_dot
    )
    return to_rows(d_out)[0], d_matrices, None


grouped_dot.defvjp(_forward, _backward)
