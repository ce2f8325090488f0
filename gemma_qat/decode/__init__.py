"""Autoregressive generation through the key/value cache, from float or packed weights."""

from gemma_qat.decode.generate import CACHES, generate, stream
from gemma_qat.decode.sampling import Sampling

__all__ = ["CACHES", "Sampling", "generate", "stream"]
