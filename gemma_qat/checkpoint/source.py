"""What every reader of a foreign checkpoint gives: which model it is, and its arrays, read one at a time.

A reader looks at names, shapes and headers first and reads no array before it is asked for one, so that a checkpoint
of any size passes through a machine that could not hold it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from gemma_qat.models import ModelConfig
from gemma_qat.numerics import QArray
from gemma_qat.quant import Plans


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaf:
    """One of our arrays where it stands in a foreign file.

    Shapes: `shape` and what `read` returns have the shape `models.declare` gives (static scales: (1,)).
    """

    path: str
    """Checkpoint path, such as layers/17/attn/q/kernel."""
    shape: tuple[int, ...]
    dtype: str
    """As stored: bfloat16, float16, float32; int2 ... int8 for codes."""
    bytes: int
    """What reading it reads."""
    read: Callable[[], np.ndarray | QArray]
    """Floats in the dtype they are stored in, or codes and scales as they are stored; derived anew every time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A foreign checkpoint, opened: it can be read as long as the files it came from stay open."""

    format: str
    """safetensors, orbax, gemma (the mobile schema), compressed-tensors, gguf."""
    config: ModelConfig
    leaves: tuple[Leaf, ...]
    """Every declared parameter once, in the order in which they are quick to read."""
    recipe: str | None = None
    """None where everything is in float."""
    plans: Plans = dataclasses.field(default_factory=dict)
    """Of the leaves whose `read` gives codes; static scales of activations are leaves of their own (float32)."""
    left: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Foreign tensors that no parameter is made of, by name, and what they are: vision tower, unused K/V, tied copy."""
    beside: tuple[Path, ...] = ()
    """Small files that belong to the model: tokenizer, chat template, generation config."""
