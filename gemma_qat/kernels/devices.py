"""Packed contractions over several devices: each multiplies with the words that it holds, and words never move.

    words [O..., W] cut along O     each device gives its own outputs                   nothing moves
    words [O..., W] cut along W     each multiplies its part of the activation          float32 sums are added up, once
    a head [V, W] cut along V       each gives the k largest of its own logits          k numbers of each are gathered

and rows of a batch stay on the devices that have them. Inside, every operation sees the arrays of one device, and its
backend is chosen by their sizes.

A kernel of Pallas is opaque to the compiler's partitioner. `jax.experimental.custom_partitioning` would have it ask how
to cut one, and libtpu does not ask (jax's own tests skip it there: "Custom partitioning is not supported on libtpu").
So it is `jax.shard_map`, and as tracers do not say where arrays lie, a weight does: `PackedArray.cut`, as
`models/layout.py` lays it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gemma_qat.numerics import PackedArray, layout_named
from gemma_qat.sharding import Axes, partition


def product(
    run: Callable[..., jax.Array], x: jax.Array, packed: PackedArray, **settings: Any
) -> jax.Array:
    """Returns `run`(x, packed): the activation's last axes contracted with the weight's reduced ones."""
    words = _words(packed)
    *outputs, summed = words
    rows = _rows(x, packed)

    def body(x: jax.Array, words: jax.Array, scale: jax.Array, layer: Any) -> jax.Array:
        out = run(x, _own(packed, words, scale, layer), **settings)
        return jax.lax.psum(out, summed) if summed else out

    others = ((),) * (len(packed.reduced) - 1)
    return _on_each(packed, body, (*rows, summed, *others), words, partition(*rows, *outputs))(x)


def largest(
    run: Callable[..., Any], x: jax.Array, packed: PackedArray, *, k: int, cap: float | None
) -> tuple[jax.Array, jax.Array]:
    """Returns `run`(x, packed, k=k, cap=cap): the k largest logits of a head that is cut by rows, and their ids.

    A device's own are sorted, the lower id first among equals, and devices hold ids in order: of all of them side by
    side the first among equals has the lowest id again.
    """
    words = _words(packed)
    own, rows = words[0], _rows(x, packed)

    def body(
        x: jax.Array, words: jax.Array, scale: jax.Array, layer: Any
    ) -> tuple[jax.Array, jax.Array]:
        held = words.shape[0]
        values, ids = run(x, _own(packed, words, scale, layer), k=min(k, held), cap=cap)
        if not own:
            return values, ids
        ids = ids + jax.lax.axis_index(own) * held
        values, ids = (
            jax.lax.all_gather(a, own, axis=a.ndim - 1, tiled=True) for a in (values, ids)
        )
        values, places = jax.lax.top_k(values, k)
        return values, jnp.take_along_axis(ids, places, axis=-1)

    return _on_each(packed, body, (*rows, ()), words, (partition(*rows), partition(*rows)))(x)


OVER: dict[str, Callable[..., Any]] = {
    "matmul": product, "integer_matmul": product, "top": largest,
}  # fmt: skip
"""Operations that work over devices; each is given the operation of one. Experts are not among them: their rows move
between devices (`nn/expert_parallel.py`), and what arrives there is one device's already."""


def _words(packed: PackedArray) -> tuple[Axes, ...]:
    """Mesh axes of the words' dimensions; W is gathered where parts would not be whole tiles and blocks."""
    *outputs, summed = packed.cut.axes
    fmt, tile = packed.grid.number, packed.grid.tile
    length = math.prod(packed.shape[axis] for axis in packed.reduced)
    together = length if tile is None else tile * fmt.super_tiles
    together = math.lcm(together, layout_named(fmt.layout, fmt.bits).block(fmt.bits))
    parts = packed.cut.placement.shards(summed)
    fits = packed.shape[packed.reduced[0]] % parts == 0 and length // parts % together == 0
    return (*outputs, summed if fits else ())


def _rows(x: jax.Array, packed: PackedArray) -> tuple[Axes, ...]:
    """Mesh axes of an activation's dimensions before those that are contracted: the first is a batch's."""
    free = x.ndim - len(packed.reduced)
    return (packed.cut.beside("batch", x.shape[0]), *((),) * (free - 1)) if free else ()


def _own(packed: PackedArray, words: jax.Array, scale: jax.Array, layer: Any) -> PackedArray:
    """Returns the weight that one device's words are."""
    first = packed.reduced[0]
    *outputs, width = words.shape if layer is None else words.shape[1:]
    reduced = [packed.shape[axis] for axis in packed.reduced]
    reduced[0] = reduced[0] * width // packed.words.shape[-1]
    shape = (*outputs[:first], *reduced, *outputs[first:])
    return dataclasses.replace(packed, words=words, scale=scale, layer=layer, shape=shape, cut=None)


def _on_each(
    packed: PackedArray, body: Callable[..., Any], lhs: Any, words: Any, leaving: Any
) -> Callable[[jax.Array], Any]:
    """Returns `body`(x, words, scale) by every device on its own parts, as a function of x."""
    stacked = ((),) * (packed.words.ndim - len(words))
    here = partition(*stacked, *words)
    # No gradient is taken inside (`gradient.py`), which is what checking would be for.
    run = packed.cut.placement.on_each_device(
        body, (partition(*lhs), here, here, None if packed.layer is None else partition()), leaving,
        checked=False,
    )  # fmt: skip
    return lambda x: run(x, packed.words, packed.scale, packed.layer)
