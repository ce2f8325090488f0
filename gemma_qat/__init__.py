"""Quantization-aware training of Gemma 4, on the exact grid that is deployed."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"

__all__ = ["coverage", "evaluate", "export", "generate", "load", "quantize", "sensitivity", "train"]


def __getattr__(name: str) -> Any:
    # The face of the package is imported when it is used, so that `gemma-qat --help` does not load jax.
    if name in __all__:
        from gemma_qat import api

        return getattr(api, name)
    raise AttributeError(f"module 'gemma_qat' has no attribute {name!r}")
