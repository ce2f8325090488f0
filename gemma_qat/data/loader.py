"""Rows -> batches in a shuffled order that is a pure function of (seed, rows taken before).

The order is one global stream of row ids (see `blend`). A step takes the stream's next
G = batch_size * shard_count elements, and shard i the i-th run of batch_size among them. So the
shards' batches, one after another, are the same global batch for every way of splitting G; each row
is used once an epoch, a batch may straddle two epochs, and every shard has the same number of steps.

The state is how many rows were taken, over all shards, and what the order depends on. It is the same
on every shard, fits in JSON, and restoring it costs nothing (the stream is indexed, not replayed).
It does not know how many shards there were or how large a batch was: a run that stopped on 4 hosts
goes on on 2, with the next row next, none twice and none left out.

Source: Grain's `MapDataset` (github.com/google/grain), which shuffles, repeats, mixes and reads ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from gemma_qat.data.blend import Blend, RowSet
from gemma_qat.data.packing import Rows, targets
from gemma_qat.errors import InputError

Batch = dict[str, np.ndarray]


class Loader:
    """Iterates over batches; `get_state` and `set_state` stop and go on exactly.

    A batch is a dict of [B, T] arrays: tokens, segments, positions, targets (int32), weights
    (float32); and ids [B] (int64), the numbers of its rows.
    """

    def __init__(
        self, open_at: Callable[[int], Iterator[Batch]], per_step: int, order: dict[str, Any]
    ) -> None:
        """Iterates over `open_at(0)`, of which a batch is `per_step` rows over all shards; see `make_loader`."""
        self._open_at, self._per_step, self._order = open_at, per_step, order
        self._taken, self._iterator = 0, open_at(0)

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        """Returns the next batch; StopIteration after the last epoch."""
        batch = next(self._iterator)
        self._taken += self._per_step  # rows read ahead are not taken
        return batch

    def get_state(self) -> dict[str, Any]:
        """Returns where the stream stands, as values that JSON can hold; equal on every shard."""
        return {**self._order, "taken": self._taken}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to where `state` was taken: the next row is the one that came next there.

        Raises: ValueError if the state belongs to another order (seed, rows, weights or epochs).
        """
        for name, value in self._order.items():
            if state.get(name) != value:
                raise InputError(
                    f"loader state: {name} was {state.get(name)!r} when saved, is {value!r} here"
                )
        self._taken = int(state["taken"])
        self._iterator = self._open_at(self._taken)


def make_loader(
    rows: RowSet | Blend,
    *,
    batch_size: int,
    seed: int,
    num_epochs: int | None = None,
    shard_index: int = 0,
    shard_count: int = 1,
    read_ahead: int = 0,
) -> Loader:
    """Returns an iterator over shuffled batches of `rows`, endless unless `num_epochs` is given.

    `batch_size` counts the rows of this shard's batch. Rows left over at the end of the last epoch,
    fewer than one global batch, are dropped. `read_ahead` batches are read in threads before they are
    asked for, which pays for rows on disk and changes nothing else.

    Raises: ValueError if the global batch is larger than the rows, the shard does not exist, or the
        seed is negative.
    Exactness: same arguments, same batches, on every machine with the same Grain release.
    """
    import grain

    blend = rows if isinstance(rows, Blend) else Blend([rows], [1.0])
    _check(len(blend), batch_size, seed, num_epochs, shard_index, shard_count)
    per_step = batch_size * shard_count
    stream = blend.stream(seed, num_epochs)
    options = grain.ReadOptions(num_threads=min(read_ahead, 4), prefetch_buffer_size=read_ahead)

    def open_at(taken: int) -> Iterator[Batch]:
        first = taken + shard_index * batch_size
        steps = max(len(stream) - taken, 0) // per_step
        own = grain.MapDataset.range(steps * batch_size).map(
            lambda at: stream[first + at // batch_size * per_step + at % batch_size]
        )
        batches = own.batch(batch_size, drop_remainder=True).map(
            lambda ids: _batch(blend[ids], ids)
        )
        return iter(batches.to_iter_dataset(options))

    return Loader(open_at, per_step, {"seed": seed, "num_epochs": num_epochs, **blend.order()})


def _check(
    count: int,
    batch_size: int,
    seed: int,
    num_epochs: int | None,
    shard_index: int,
    shard_count: int,
) -> None:
    if batch_size < 1 or (num_epochs is not None and num_epochs < 1):
        given = f"batch size {batch_size}, epochs {num_epochs}"
        raise InputError(f"loader: {given}: expected 1 or more")
    if not 0 <= shard_index < shard_count:
        given = f"shard {shard_index} of {shard_count}"
        raise InputError(f"loader: {given}: expected 0 <= index < count")
    if seed < 0:
        raise InputError(f"loader: seed {seed}, expected 0 or more")
    if batch_size * shard_count > count:
        shards = f" on {shard_count} shards" if shard_count > 1 else ""
        raise InputError(f"loader: batch size {batch_size}{shards} is larger than the {count} rows")


def _batch(rows: Rows, ids: np.ndarray) -> Batch:
    next_tokens, weights = targets(rows)
    return {
        "ids": np.asarray(ids, np.int64),
        "tokens": rows.tokens,
        "segments": rows.segments,
        "positions": rows.positions,
        "targets": next_tokens,
        "weights": weights,
    }
