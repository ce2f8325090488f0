"""What every reader of a foreign checkpoint gives: which model it is, and its arrays, read one at a time.

A reader looks at names, shapes and headers first and reads no array before it is asked for one, so that a checkpoint
of any size passes through a machine that could not hold it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

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
    carried: tuple[Leaf, ...] = ()
    """Those of `left` that are another model's (vision, audio): foreign names, read as they are stored."""
    beside: tuple[Path, ...] = ()
    """Small files that belong to the model: tokenizer, chat template, generation config."""
    made: Mapping[str, Callable[[], bytes]] = dataclasses.field(default_factory=dict)
    """The same of a format that has them within its one file: what makes them, by name."""


UNUSED = "unused key or value of a layer that shares another's"
TIED = "head beside a tied embedding, which is read in its place"
"""What `Source.left` calls tensors that nothing reads; towers are called by what they see."""


class Reading(Mapping[str, Any]):
    """The arrays of an opened checkpoint by path, each read when it is asked for."""

    def __init__(self, source: Source) -> None:
        """Wraps an opened source."""
        self._leaves = {leaf.path: leaf for leaf in source.leaves}

    def __getitem__(self, path: str) -> QArray | np.ndarray:
        return self._leaves[path].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._leaves)

    def __len__(self) -> int:
        return len(self._leaves)


class LastRead:
    """Reads foreign tensors by name and keeps the last one: several of our arrays may be parts of it."""

    def __init__(self, read: Callable[[str], np.ndarray], shared: Iterable[str]) -> None:
        """Keeps only tensors named in `shared`; the others are read and let go."""
        self._read, self._shared = read, frozenset(shared)
        self._name: str | None = None
        self._array: np.ndarray | None = None

    def __call__(self, name: str) -> np.ndarray:
        """Returns a tensor."""
        if self._array is not None and name == self._name:
            return self._array
        self._array = None  # let go before the next is read: two of them would be twice the memory
        array = self._read(name)
        if name in self._shared:
            self._name, self._array = name, array
        return array
