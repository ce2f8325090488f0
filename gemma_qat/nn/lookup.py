"""Rows of a table that is cut over devices: ids and rows move, the table never does.

A table [V, D] lies with its rows cut over the mesh axes of `vocab`, most of which also cut the batch. Every device

    1. gathers the ids of the devices it shares the table with            int32 [b n, t]      (n shards)
    2. looks up, and rounds, those rows that it holds; zeros elsewhere     [b n, t, D]
    3. adds up over the shards and keeps its own rows of the batch        [b, t, D]           reduce-scatter

and the gradient runs the same way back: row gradients are gathered and each shard adds up those of its own rows.
Exactly one shard contributes to a row, so the sum is exact in any dtype, and it is taken in the activation's.

t is T / n where n divides T: the buffer of step 2 then has the size of the result, however many shards there are.

The alternative, gathering the table, moves V D elements instead of B T D (fewer, for very large batches), and needs
the whole table, and the whole gradient in float32, on every device: 4.7 and 9.4 GB for the per-layer table of E2B.
Memory is what runs out first, so that is not done.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gemma_qat.nn.contract import Weight
from gemma_qat.nn.module import merge, split
from gemma_qat.nn.taps import Taps, looks_inside
from gemma_qat.sharding import Placement, partition, varying
from gemma_qat.sharding.rules import Axes


def look_up(
    table: Weight,
    ids: Int[Array, "B T"],
    axis: str,
    dtype: str,
    placement: Placement | None,
    taps: Taps | None = None,
) -> Float[Array, "B T ..."]:
    """Returns the rows `ids` of a table [V, ...] whose rows are named `axis`, rounded as its plan says, as `dtype`.

    Somebody who listens gets the plain look-up, the same values.
    """
    cut = placement.cut_over(axis, table.leaf.shape[0]) if placement is not None else ()
    if placement is None or not cut or looks_inside(taps):
        return table.rows(ids, taps).astype(dtype)
    graph, state = split(table)
    batch = placement.cut_over("batch", ids.shape[0])
    held = table.leaf.shape[0] // placement.shards(cut)
    one_dimension = partition()
    arriving = jax.tree.map(lambda x: partition(cut) if x.ndim > 1 else one_dimension, state)

    def body(state: Any, ids: jax.Array) -> jax.Array:
        state = varying(state, arriving, batch)
        both = tuple(a for a in cut if a in batch)
        parts = _pieces(ids.shape[1], placement.shards(both))

        def piece(ids: jax.Array) -> jax.Array:
            return _rows(merge(graph, state), ids, dtype, held, cut, both)

        split_ids = jnp.moveaxis(ids.reshape(ids.shape[0], parts, ids.shape[1] // parts), 1, 0)
        found = jnp.moveaxis(jax.lax.map(piece, split_ids), 0, 1)
        return found.reshape(*ids.shape, *found.shape[3:])

    run = placement.on_each_device(body, (arriving, partition(batch)), partition(batch))
    return run(state, ids)


def _pieces(length: int, most: int) -> int:
    """Returns the largest divisor of `length` up to `most`."""
    return next(n for n in range(min(length, most), 0, -1) if length % n == 0)


def _rows(table: Weight, ids: jax.Array, dtype: str, held: int, cut: Axes, both: Axes) -> jax.Array:
    """Returns this device's rows of the batch, each from the shard (of `held` rows) that holds it."""
    if both:
        ids = jax.lax.all_gather(ids, both, axis=0, tiled=True)
    local = ids - jax.lax.axis_index(cut) * held
    mine = (local >= 0) & (local < held)
    rows = table.rows(jnp.where(mine, local, 0)).astype(dtype)
    rows = jnp.where(jnp.expand_dims(mine, tuple(range(2, rows.ndim))), rows, 0)
    alone = tuple(a for a in cut if a not in both)
    if alone:
        rows = jax.lax.psum(rows, alone)
    return jax.lax.psum_scatter(rows, both, scatter_dimension=0, tiled=True) if both else rows
