"""Packed decoding. `reference` (pure jnp) defines it; the table of backends is the place for faster ones."""

from gemma_qat.kernels.reference import grouped_matmul, matmul

__all__ = ["grouped_matmul", "matmul"]
