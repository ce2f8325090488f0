"""One stream of rows over several sets of them, each as often as its weight says.

A row's id is its number in all sets, one after another. The stream is a function of (seed, place): of
every set an endless, or `num_epochs` long, sequence of fresh permutations, interleaved so that at any
place each set has given its share to within as many rows as there are sets. A set that is small for
its weight is repeated, a large one is not used up; nothing is sampled with replacement.

Source: Grain's `MapDataset.mix`, which takes weights to a hundredth of the smallest.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from gemma_qat.data.packing import Rows
from gemma_qat.errors import InputError


@runtime_checkable
class RowSet(Protocol):
    """Rows by number, in memory or on disk."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: Any) -> Rows: ...
    @property
    def digest(self) -> int: ...  # noqa: D102


class Blend:
    """Sets of rows with weights; `blend[ids]` are rows of any of them."""

    def __init__(self, parts: Sequence[RowSet], weights: Sequence[float]) -> None:
        """Joins row sets.

        Raises: InputError for a weight that is not more than 0, or a set without rows.
        """
        if len(parts) != len(weights) or not parts:
            raise InputError(f"blend: {len(weights)} weights for {len(parts)} sets of rows")
        if min(weights) <= 0:
            raise InputError(f"blend: weights {list(weights)}, expected more than 0")
        if not all(len(part) for part in parts):
            raise InputError("blend: a set without rows")
        self.parts, self.weights = tuple(parts), tuple(map(float, weights))
        self._ends = list(itertools.accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, ids: np.ndarray) -> Rows:
        """Returns rows by id, in the order of the ids."""
        if len(self.parts) == 1:
            return self.parts[0][ids]
        owner = np.searchsorted(self._ends, ids, side="right")
        starts = [0, *self._ends[:-1]]
        used = np.unique(owner)
        found = [self.parts[part][ids[owner == part] - starts[part]] for part in used]
        joined = {name: np.concatenate([getattr(r, name) for r in found]) for name in _FIELDS}
        back = np.argsort(np.concatenate([np.flatnonzero(owner == part) for part in used]))
        return Rows(**joined)[back]

    def stream(self, seed: int, num_epochs: int | None) -> Any:
        """Returns the ids in the order of training, a Grain dataset.

        With `num_epochs` it ends where the first set would begin another epoch.
        """
        import grain

        starts = [0, *self._ends[:-1]]
        streams = [
            grain.MapDataset.range(start, start + len(part))
            .seed(seed + number)
            .shuffle()
            .repeat(num_epochs)
            for number, (start, part) in enumerate(zip(starts, self.parts, strict=True))
        ]
        return streams[0] if len(streams) == 1 else grain.MapDataset.mix(streams, self.weights)

    def order(self) -> dict[str, Any]:
        """Returns what the stream depends on beside the seed, as values that JSON can hold."""
        return {
            "rows": [len(part) for part in self.parts],
            "digest": [part.digest for part in self.parts],
            "weights": list(self.weights),
        }


_FIELDS = ("tokens", "segments", "positions", "documents", "learn")
