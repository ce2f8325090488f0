"""Generation from float, fake-quantized and packed models alike."""

from gemma_qat.decode.generate import generate

__all__ = ["generate"]
