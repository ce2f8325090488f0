"""Rows -> batches in a shuffled order that is a pure function of (seed, step).

The order is one global stream: epoch after epoch, each a fresh permutation of the rows. Step k uses
the stream's elements [k * G, (k + 1) * G) with G = batch_size * shard_count, and shard i of n takes
every n-th of them. So the union over shards is the same for every way of splitting G, each row is
used once an epoch, a batch may straddle two epochs, and every shard has the same number of steps.

The state is the number of steps taken plus what the order depends on; it is the same on every
shard, fits in JSON, and restoring it costs nothing (the stream is indexed, not replayed). Rows may
be memory-mapped arrays: only the rows of a batch are read.

Source: Grain's `MapDataset` (github.com/google/grain), which does the shuffling, repeating and
counting.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

from gemma_qat.data.packing import Rows, targets
from gemma_qat.errors import InputError

Batch = dict[str, np.ndarray]


class Loader:
    """Iterates over batches; `get_state` and `set_state` stop and go on exactly.

    A batch is a dict of [B, T] arrays: tokens, segments, positions, targets (int32), weights
    (float32).
    """

    def __init__(self, iterator: Any, order: dict[str, Any]) -> None:
        """Wraps a Grain iterator over batches with what its order depends on; see `make_loader`."""
        self._iterator = iterator
        self._order = order

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        """Returns the next batch; StopIteration after the last epoch."""
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """Returns where the stream stands, as values that JSON can hold; equal on every shard."""
        return {**self._order, "iterator": self._iterator.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to where `state` was taken: the next batch is the one that came next there.

        Raises: ValueError if the state belongs to another order (seed, rows, global batch or
            epochs).
        """
        for name, value in self._order.items():
            if state.get(name) != value:
                raise InputError(
                    f"loader state: {name} was {state.get(name)!r} when saved, is {value!r} here"
                )
        self._iterator.set_state(dict(state["iterator"]))


def make_loader(
    rows: Rows,
    *,
    batch_size: int,
    seed: int,
    num_epochs: int | None = None,
    shard_index: int = 0,
    shard_count: int = 1,
) -> Loader:
    """Returns an iterator over shuffled batches of `rows`, endless unless `num_epochs` is given.

    `batch_size` counts the rows of this shard's batch. Rows left over at the end of the last epoch,
    fewer than one global batch, are dropped.

    Raises: ValueError if the global batch is larger than the rows, the shard does not exist, or the
        seed is negative.
    Exactness: same arguments, same batches, on every machine with the same Grain release.
    """
    import grain

    _check(len(rows), batch_size, seed, num_epochs, shard_index, shard_count)
    global_batch = batch_size * shard_count
    stream = grain.MapDataset.range(len(rows)).seed(seed).shuffle().repeat(num_epochs)
    stream = stream[: len(stream) // global_batch * global_batch][shard_index::shard_count]
    batches = stream.batch(batch_size, drop_remainder=True).map(lambda at: _batch(rows[at]))
    # The arrays are in memory, so reading ahead in threads would only add a race to think about.
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    order = {
        "seed": seed,
        "rows": len(rows),
        "digest": _digest(rows),
        "global_batch": global_batch,
        "num_epochs": num_epochs,
    }
    return Loader(iter(batches.to_iter_dataset(options)), order)


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


def _batch(rows: Rows) -> Batch:
    next_tokens, weights = targets(rows)
    return {
        "tokens": rows.tokens,
        "segments": rows.segments,
        "positions": rows.positions,
        "targets": next_tokens,
        "weights": weights,
    }


def _digest(rows: Rows) -> int:
    """A checksum of tokens and segments: a state is only good for the rows it was taken on."""
    first = zlib.crc32(np.ascontiguousarray(rows.tokens).data)
    return zlib.crc32(np.ascontiguousarray(rows.segments).data, first)
