"""Experts over devices: tokens move to their experts and come back, and none is dropped.

`mixed` is the layer on one device: the X rows of every token are sorted by expert, each expert multiplies its own
rows, and a token adds up its rows times their weights. On a mesh every device does that for its own tokens, inside
one `shard_map`, and the preset decides how it reaches the experts (E / n on each of n devices):

    cut over an axis that also cuts the batch     exchange   rows go to the device that has their expert, and back
    cut over an axis that does not (`tensor`)     select     every device has the same tokens, does the rows of its own
                                                             experts and adds up with the others
    not cut (`fsdp`)                              gather     the matrices come to the tokens

Cuts that are only for storage are undone on entry by an all-gather of whole experts, whose transpose is a
reduce-scatter. Cuts along E never meet a tile or a packed word, whatever the format.

**Memory of the exchange.** Nothing bounds how many rows one device may be sent but the number of all rows, and no row
is dropped, so every device has buffers for n C rows (C = B T X rows of its own). `exchange_bytes` is that number. It
is the price of the promise; smaller batches per step (gradient accumulation) or fewer shards make it smaller.

Rows travel by `jax.lax.ragged_all_to_all` where the backend has it (TPU): only rows that exist cross the wire, packed
by source. Elsewhere by `all_to_all` of [n, C] slots of which the first so many are filled: n times the traffic, the
same result. Both ways rows arrive grouped by source and, within a source, sorted by expert, and are sorted once more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gemma_qat.nn.module import Module, merge, split
from gemma_qat.numerics import PackedArray, is_packed
from gemma_qat.sharding import Placement, partition, varying
from gemma_qat.sharding.rules import Axes

Multiply = Callable[[Any, Any], Any]
"""(rows sorted by expert [C, D], rows of each expert [E]) -> [C, D]."""

RAGGED = ("tpu",)
"""Platforms whose compiler has `ragged_all_to_all`."""


def exchange_bytes(tokens: int, per_token: int, width: int, shards: int, itemsize: int) -> int:
    """Returns the bytes of one exchange buffer on a device that has so many tokens of its own.

    A layer holds two at a time (rows sent and rows received), of the model width.
    """
    return shards * tokens * per_token * width * itemsize


def mixed(
    y: Float[Array, "B T D"],
    experts: Int[Array, "B T X"],
    weights: Float[Array, "B T X"],
    count: int,
    multiply: Multiply,
) -> Float[Array, "B T D"]:
    """Returns the weighted sum of each token's experts, float32; `multiply` puts sorted rows through them."""
    B, T, D = y.shape
    X = experts.shape[-1]
    flat = experts.reshape(B * T * X)
    order = jnp.argsort(flat, stable=True)
    sizes = jnp.bincount(flat, length=count).astype(jnp.int32)
    token_C = order // X
    out_CD = multiply(jnp.take(y.reshape(B * T, D), token_C, axis=0), sizes)
    weight_C = jnp.take(weights.reshape(B * T * X), order)
    summed = jnp.zeros((B * T, D), jnp.float32)
    summed = summed.at[token_C].add(out_CD.astype(jnp.float32) * weight_C[:, None])
    return summed.reshape(B, T, D)


def over_devices(
    module: Module,
    y: Float[Array, "B T D"],
    experts: Int[Array, "B T X"],
    weights: Float[Array, "B T X"],
    count: int,
    placement: Placement,
) -> Float[Array, "B T D"]:
    """Returns the weighted sum of each token's experts, every device working for its own tokens.

    `module` has `each(rows, group_sizes)`, which puts sorted rows through `count` experts; all its matrices have them
    as first axis.

    Exactness: equals the layer on one device up to the rounding of float32 sums in another order.
    """
    graph, state = split(module)
    state = jax.tree.map(_alone, state, is_leaf=is_packed)
    batch = placement.cut_over("batch", y.shape[0])
    stored = placement.cut_over("experts", count, stored=True)
    kept = placement.cut_over("experts", count)
    moving = tuple(axis for axis in kept if axis in batch)
    still = kept[len(moving) :]
    # Axes stand in this order in the table: of experts that lie together some are exchanged, then some of those
    # selected, and what is cut for storage alone comes last, so that gathering it leaves consecutive experts.
    assert kept == moving + still and stored[: len(kept)] == kept, (stored, kept, batch)
    arriving = jax.tree.map(lambda x: partition(stored) if x.ndim > 1 else partition(), state)
    packed = any(map(is_packed, jax.tree.leaves(state, is_leaf=is_packed)))

    def body(state: Any, y: jax.Array, experts: jax.Array, weights: jax.Array) -> jax.Array:
        state = state if packed else varying(state, arriving, batch)
        state = _whole(state, stored[len(kept) :], batch, count // placement.shards(kept))
        mine = merge(graph, state)
        multiply: Multiply = mine.each
        if still:
            multiply = selected(multiply, still)
        if moving:
            multiply = exchanged(multiply, moving, ragged=placement.platform in RAGGED)
        out = mixed(y, experts, weights, count, multiply)
        return (jax.lax.psum(out, still) if still else out).astype(y.dtype)

    tokens = partition(batch)
    run = placement.on_each_device(
        body, (arriving, tokens, tokens, tokens), tokens, checked=not packed
    )
    return run(state, y, experts, weights)


def _whole(state: Any, axes: Axes, batch: Axes, count: int) -> Any:
    """Returns the leaves of this device's `count` experts, gathered over the axes that are cut for storage only."""

    def gather(leaf: jax.Array) -> jax.Array:
        for axis in reversed(axes) if leaf.ndim > 1 else ():
            # Where the tokens are the same along the axis, so is all that is computed from them.
            kind = "varying" if axis in batch else "invarying"
            leaf = jax.lax.all_gather(leaf, axis, axis=0, tiled=True, to=kind)
        return leaf

    def one(leaf: Any) -> Any:
        found = jax.tree.map(gather, leaf)
        if isinstance(leaf, PackedArray):
            return dataclasses.replace(found, shape=(count, *leaf.shape[1:]), cut=None)
        return found

    return jax.tree.map(one, state, is_leaf=is_packed)


def _alone(leaf: Any) -> Any:
    """Returns a weight of a stack of layers by itself: the first axis is that of experts then, which are cut."""
    return leaf.alone() if isinstance(leaf, PackedArray) else leaf


def selected(multiply: Multiply, axes: Axes) -> Multiply:
    """Returns `multiply` for all experts of a group of devices that have the same rows: others' rows give zeros."""

    def run(rows: jax.Array, sizes: jax.Array) -> jax.Array:
        count = sizes.shape[0] // jax.lax.axis_size(axes)
        first = jax.lax.axis_index(axes) * count
        own = jax.lax.dynamic_slice(sizes, (first,), (count,))
        before = jnp.sum(jnp.where(jnp.arange(sizes.shape[0]) < first, sizes, 0))
        out = _filled(multiply, jnp.roll(rows, -before, axis=0), own)
        return jnp.roll(out, before, axis=0)

    return run


def exchanged(multiply: Multiply, axes: Axes, *, ragged: bool) -> Multiply:
    """Returns `multiply` for the experts of all devices along `axes`: rows go where their expert is, and come back."""

    def run(rows: jax.Array, sizes: jax.Array) -> jax.Array:
        n = jax.lax.axis_size(axes)
        leaving = sizes.reshape(n, sizes.shape[0] // n)
        arriving = jax.lax.all_to_all(leaving, axes, 0, 0, tiled=True)
        way = (_ragged if ragged else _padded)(leaving.sum(1), arriving.sum(1), rows.shape[0], axes)
        expert = _expert_at(arriving, *way.slots)
        order = jnp.argsort(expert, stable=True)
        received = jnp.take(way.send(rows), order, axis=0)
        out = _filled(multiply, received, arriving.sum(0))
        return way.give_back(jnp.zeros_like(out).at[order].set(out))

    return run


def _filled(multiply: Multiply, rows: jax.Array, sizes: jax.Array) -> jax.Array:
    """Returns `multiply` of the rows that belong to a group, and zeros (gradients too) for those past the last."""
    inside = (jnp.arange(rows.shape[0]) < jnp.sum(sizes))[:, None]
    return jnp.where(inside, multiply(jnp.where(inside, rows, 0), sizes), 0)


def _expert_at(arriving: jax.Array, source: jax.Array, place: jax.Array) -> jax.Array:
    """Returns the expert of each slot; one more than the last for an empty one.

    Shapes: arriving [sources, experts] rows; source and place [slots], place counted within the source's rows.
    """
    ends = jnp.take(jnp.cumsum(arriving, axis=1), source, axis=0, mode="clip")
    expert = jnp.sum(place[:, None] >= ends, axis=1)
    return jnp.where(source < arriving.shape[0], expert, arriving.shape[1])


@dataclasses.dataclass(frozen=True)
class _Way:
    """How rows travel: [C, D] out to [n C, D] slots here and there, and back; `slots` says (source, place) of each."""

    send: Callable[[jax.Array], jax.Array]
    give_back: Callable[[jax.Array], jax.Array]
    slots: tuple[jax.Array, jax.Array]


def _starts(sizes: jax.Array) -> jax.Array:
    return jnp.cumsum(sizes) - sizes


def _padded(sent: jax.Array, received: jax.Array, rows: int, axes: Axes) -> _Way:
    """Slots [n, C]: one run of C for each partner, the first so many of it filled."""
    del received
    n = sent.shape[0]
    place = jnp.arange(rows)
    starts = _starts(sent)

    def send(x: jax.Array) -> jax.Array:
        index = jnp.minimum(starts[:, None] + place[None, :], rows - 1)
        filled = place[None, :] < sent[:, None]
        slots = jnp.where(filled[..., None], jnp.take(x, index, axis=0), 0)
        slots = jax.lax.all_to_all(slots, axes, 0, 0, tiled=True)
        return slots.reshape(n * rows, x.shape[1])

    def give_back(x: jax.Array) -> jax.Array:
        slots = jax.lax.all_to_all(x.reshape(n, rows, x.shape[1]), axes, 0, 0, tiled=True)
        partner = jnp.searchsorted(jnp.cumsum(sent), place, side="right")
        where = partner * rows + place - jnp.take(starts, partner)
        return jnp.take(slots.reshape(n * rows, x.shape[1]), where, axis=0)

    slot = jnp.arange(n * rows)
    return _Way(send, give_back, (slot // rows, slot % rows))


def _ragged(sent: jax.Array, received: jax.Array, rows: int, axes: Axes) -> _Way:
    """Slots [n C]: what arrived, one source after the other, empty ones at the end."""
    n = sent.shape[0]
    here = jax.lax.axis_index(axes)
    table = jax.lax.all_gather(sent, axes)  # [source, destination]
    earlier_sources = jnp.sum(jnp.where(jnp.arange(n)[:, None] < here, table, 0), axis=0)
    earlier_partners = jnp.sum(jnp.where(jnp.arange(n)[None, :] < here, table, 0), axis=1)

    def move(x: jax.Array, slots: int, out: jax.Array, back: jax.Array, at: jax.Array) -> jax.Array:
        room = jnp.pad(x[:0], ((0, slots), (0, 0)))
        return jax.lax.ragged_all_to_all(x, room, _starts(out), out, at, back, axis_name=axes)

    slot = jnp.arange(n * rows)
    source = jnp.searchsorted(jnp.cumsum(received), slot, side="right")
    place = slot - jnp.take(_starts(received), source, mode="clip")
    return _Way(
        send=lambda x: move(x, n * rows, sent, received, earlier_sources),
        give_back=lambda x: move(x, rows, received, sent, earlier_partners),
        slots=(source, place),
    )
