"""Contractions that jax alone does not do, or not fast: packed weights, rows of experts.

    operations   what layers call; each runs the backend that `choose` gives for the platform
    table        the backends: where each runs, what it refuses, and why one was chosen
    reference    pure jnp, defines packed decoding; the others must agree with it
    blocked*     plain XLA a block at a time, for CPU: never holds an unpacked weight, nor a cache of floats
    tpu_*        Pallas for TPU: products, rows of experts, the head's largest logits, attention; how they cut blocks
    gpu          Pallas kernels for NVIDIA GPUs (`gpu_block`: reading and decoding; `gpu_tiling`: sizes)
    devices      operations over a mesh: each device multiplies with the words it holds
    gradient     the definition's gradient, for kernels that have none

`problem` says what a packed contraction looks like to all of them, `cached` what attention over a cache of codes does.
`grouped` is the floating-point product of rows with the matrices of their experts, with a gradient that is fast on TPU
too.
"""

from gemma_qat.kernels.cached import Cached, cached_of
from gemma_qat.kernels.grouped import grouped_dot
from gemma_qat.kernels.operations import (
    attend,
    grouped_matmul,
    integer_grouped_matmul,
    integer_matmul,
    matmul,
    rows,
    top,
)
from gemma_qat.kernels.problem import Problem, problem_of
from gemma_qat.kernels.table import BACKENDS, Backend, Choice, choose, using

__all__ = [
    "BACKENDS",
    "Backend",
    "Cached",
    "Choice",
    "Problem",
    "attend",
    "cached_of",
    "choose",
    "grouped_dot",
    "grouped_matmul",
    "integer_grouped_matmul",
    "integer_matmul",
    "matmul",
    "problem_of",
    "rows",
    "top",
    "using",
]
