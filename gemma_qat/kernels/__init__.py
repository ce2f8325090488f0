"""Contractions that jax alone does not do, or not fast: packed weights, rows of experts.

`reference` (pure jnp) defines packed decoding; the table of backends is the place for faster ones. `grouped` is the
floating-point product of rows with the matrices of their experts, with a gradient that is fast on TPU too.
"""

from gemma_qat.kernels.grouped import grouped_dot
from gemma_qat.kernels.reference import grouped_matmul, matmul

__all__ = ["grouped_dot", "grouped_matmul", "matmul"]
