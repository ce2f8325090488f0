"""Attention of one token a row over a cache of codes on GPU (Pallas, Triton).

A program has one head of keys and values of one row of the batch and all its queries, 16 of them for the tensor cores,
of which some may be none. Where there are few such programs, several share the blocks of a cache in turn, so that what
is written of it is spread evenly over them, and their sums are put together afterwards (as in flash-decoding, Dao et
al. 2023). The sizes are guesses, as those of `gpu_tiling`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float

from gemma_qat.kernels.cached import Cached, cached_of, numbers, parts_seen, weights_of
from gemma_qat.kernels.gpu_block import launch
from gemma_qat.kernels.gpu_tiling import DOT_ROWS, PROGRAMS
from gemma_qat.kernels.reference import MASKED
from gemma_qat.numerics.cache_codes import Coded, layer_of

NAME = "gpu_attend_codes"
"""What the kernel is called in a compiled program."""

TILE_BYTES = 2**15
"""Of a block of keys as the floats that are multiplied: 64 slots of 256 bfloat16."""

LEAST_SLOTS = 256
"""Of a program, if all of a cache is written: sums that are put together cost little beside reading so many."""

MOST_CODES = 2**31
"""Of a cache: places in it are counted in 32 bits, one for a sign."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut:
    """How a cache is cut: `splits` programs for each head and row of the batch take blocks of `slots` in turn."""

    slots: int
    splits: int
    warps: int = 4
    stages: int = 2

    @classmethod
    def of(cls, problem: Cached) -> Cut:
        """Returns the cut of a problem."""
        row = problem.width * jnp.dtype(problem.dtype).itemsize
        slots = max(DOT_ROWS, TILE_BYTES // row)
        splits = min(
            math.ceil(PROGRAMS / (problem.batch * problem.heads)),
            math.ceil(problem.slots / LEAST_SLOTS),
        )
        return cls(slots=slots, splits=splits)


def refuses(problem: Cached) -> str | None:
    """Returns why the kernel does not take a problem; None when it does."""
    if problem.dtype not in ("float32", "bfloat16"):
        return f"queries of {problem.dtype}, float32 or bfloat16 expected"
    if problem.row < DOT_ROWS or problem.row & (problem.row - 1):
        return f"{problem.row} bytes of codes a head, a power of two from {DOT_ROWS} on expected"
    if problem.group > DOT_ROWS:
        return f"{problem.group} query heads for one of keys, at most {DOT_ROWS}"
    if problem.batch * problem.slots * problem.heads * problem.row >= MOST_CODES:
        return "2 GiB of codes or more: places are counted in 32 bits"
    return None


def attend(
    q: Float[Array, "B K G H"],
    keys: Coded,
    values: Coded,
    visible: Bool[Array, "B S"],
    layer: Any = None,
) -> Float[Array, "B K G H"]:
    """Returns the attention output, float32; zeros for a row that sees nothing."""
    if layer is not None and keys.codes.size >= MOST_CODES:  # then one layer's are copied out
        keys, values = layer_of((keys, values), layer)
        layer = None
    if layer is None:
        keys, values = jax.tree.map(lambda x: x[None], (keys, values))
    number = jnp.reshape(jnp.asarray(0 if layer is None else layer, jnp.int32), (1,))
    problem = cached_of(q, keys)
    cut = Cut.of(problem)
    more = DOT_ROWS - problem.group
    queries = jnp.pad(q, ((0, 0), (0, 0), (0, more), (0, 0)))
    # [B, K, G, H] as [B, K, G, place in a byte, byte].
    queries = queries.reshape(
        problem.batch, problem.heads, DOT_ROWS, 8 // problem.bits, problem.row
    )
    lead = (problem.batch, problem.heads, cut.splits)
    most, total, sums = launch(
        functools.partial(_kernel, problem, cut),
        parts_seen(visible, cut.slots), number,
        jnp.moveaxis(queries, 3, 2), keys.codes, keys.scale, values.codes, values.scale,
        visible.astype(jnp.int8),
        name=NAME, tiling=cut, grid=(problem.batch * problem.heads, cut.splits),
        out_shape=(
            jax.ShapeDtypeStruct((*lead, DOT_ROWS), jnp.float32),
            jax.ShapeDtypeStruct((*lead, DOT_ROWS), jnp.float32),
            jax.ShapeDtypeStruct((*lead, DOT_ROWS, problem.width), jnp.float32),
        ),
    )  # fmt: skip
    share = jnp.exp(most - jnp.max(most, axis=2, keepdims=True))
    whole = jnp.sum(total * share, axis=2)
    out = jnp.sum(sums * share[..., None], axis=2)
    out = out / jnp.where(whole > 0, whole, 1.0)[..., None]
    return out[:, :, : problem.group]


def _kernel(
    problem: Cached, cut: Cut, seen: Any, layer: Any, q: Any, keys: Any, key_scale: Any,
    values: Any, value_scale: Any, visible: Any, most_out: Any, total_out: Any, sums_out: Any,
) -> None:  # fmt: skip
    row, head = pl.program_id(0) // problem.heads, pl.program_id(0) % problem.heads
    split = pl.program_id(1)
    first, last = seen[row, 0], seen[row, 1]
    own = (layer[0], row)
    places = range(8 // problem.bits)

    def read(ref: Any, place: tuple[Any, ...], inside: Any) -> jax.Array:
        return plgpu.load(ref.at[place], mask=inside, other=0)

    def block(number: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        most, total, sums = carry
        start = (first + split + number * cut.splits) * cut.slots
        slots = pl.ds(start, cut.slots)
        inside = start + jnp.arange(cut.slots) < problem.slots
        wide = jnp.broadcast_to(inside[:, None], (cut.slots, problem.row))

        def floats(ref: Any) -> tuple[jax.Array, ...]:
            words = read(ref, (*own, slots, head, slice(None)), wide)
            signed = jax.lax.bitcast_convert_type(words, jnp.int8).astype(jnp.int32)
            return numbers(signed, problem.bits, problem.dtype)

        ours = (read(visible, (row, slots), inside) > 0)[None, :]
        scores = jnp.zeros((DOT_ROWS, cut.slots), jnp.float32)
        for place, key in zip(places, floats(keys), strict=True):
            scores += _dot(q[row, head, place], key, 1)
        scores *= read(key_scale, (*own, slots, head), inside)[None, :]
        weights, now, before = weights_of(scores, ours, most)
        total = total * before + jnp.sum(weights, axis=1, keepdims=True)
        weights *= read(value_scale, (*own, slots, head), inside)[None, :]
        weights = weights.astype(problem.dtype)
        sums = tuple(
            one * before + _dot(weights, value, 0)
            for one, value in zip(sums, floats(values), strict=True)
        )
        return now, total, sums

    start = (
        jnp.full((DOT_ROWS, 1), MASKED, jnp.float32),
        jnp.zeros((DOT_ROWS, 1), jnp.float32),
        tuple(jnp.zeros((DOT_ROWS, problem.row), jnp.float32) for _ in places),
    )
    steps = (jnp.maximum(last + 1 - first - split, 0) + cut.splits - 1) // cut.splits
    most, total, sums = jax.lax.fori_loop(0, steps, block, start)
    most_out[row, head, split] = most.reshape(DOT_ROWS)
    total_out[row, head, split] = total.reshape(DOT_ROWS)
    for place, one in zip(places, sums, strict=True):
        sums_out[row, head, split, :, pl.ds(place * problem.row, problem.row)] = one


def _dot(x: jax.Array, codes: jax.Array, axis: int) -> jax.Array:
    """Returns x [M, n] times codes, summed over their `axis`; float32 is multiplied as it is, not rounded."""
    return jax.lax.dot_general(
        x, codes, (((1,), (axis,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )  # fmt: skip
