"""Quantization-aware training of Gemma 4, on the exact grid that is deployed."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

__all__ = [
    "coverage",
    "evaluate",
    "export",
    "generate",
    "load",
    "quantize",
    "sensitivity",
    "sweep",
    "train",
]


def __getattr__(name: str) -> Any:
    # The face of the package is imported when it is used, so that `gemma-qat --help` does not load jax.
    if name in __all__:
        from gemma_qat import api

        return getattr(api, name)
    raise AttributeError(f"module 'gemma_qat' has no attribute {name!r}")


class _Verb(ModuleType):
    """A part of the package that is a verb too: `gemma_qat.train(config)` beside `gemma_qat.train.losses`."""

    def __call__(self, *positional: Any, **named: Any) -> Any:
        from gemma_qat import api

        return getattr(api, self.__name__.rpartition(".")[2])(*positional, **named)


class _Face(ModuleType):
    """The package itself: the import system sets every part as an attribute of it, and would hide the verb."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in __all__ and isinstance(value, ModuleType):
            value.__class__ = _Verb
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Face
