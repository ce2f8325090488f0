"""The largest logits of a packed head on TPU: logits are made a block at a time and never leave the chip.

Each of 128 lanes keeps the k largest logits that it has seen, with their ids, in order: a new one is put before the
first that is smaller and all from there on move down, so that of equal ones the earlier, lower, id stays in front. The
k largest of a row are among those of its lanes; [M, k * 128] of them are written, and picked from outside.
The soft cap comes before the comparison, as it may make different logits equal.

The table is walked in two halves that know nothing of one another, so that a chip with two cores uses both.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from gemma_qat.kernels.reference import capped
from gemma_qat.kernels.tpu_blocks import operands, parameters
from gemma_qat.kernels.tpu_decode import LANES, Lying, for_outputs, product
from gemma_qat.kernels.tpu_products import products
from gemma_qat.numerics import PackedArray

NAME = "packed_top"
"""What the kernel is called in a compiled program."""

MOST = 64
"""Above so many of a row, logits are written and sorted as a whole."""

PARTS = 2
_NOBODY = 2**31 - 1


def top(
    x: Float[Array, "... D"],
    packed: PackedArray,
    k: int,
    cap: float | None,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "... k"], Int[Array, "... k"]]:
    """Returns the k largest soft-capped logits and their ids, the lower id first where two are equal."""
    rows = x.reshape(-1, x.shape[-1])
    if k > MOST:
        values, ids = jax.lax.top_k(capped(products(rows, packed, interpret), cap), k)
    else:
        values, ids = _largest(*_candidates(rows, packed, k, cap, interpret), k)
    return values.reshape(*x.shape[:-1], k), ids.reshape(*x.shape[:-1], k)


def _largest(values: jax.Array, ids: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Returns the k largest of candidates [M, n], the lower id first where two are equal.

    One sort of all of them by value and id would do and takes the compiler most of a minute: first the k are found,
    then those alone are sorted.
    """
    if k == 1:
        most = jnp.max(values, axis=1, keepdims=True)
        return most, jnp.min(jnp.where(values == most, ids, _NOBODY), axis=1, keepdims=True)
    least = jax.lax.top_k(values, k)[0][:, -1:]
    # Whatever is larger than the k-th is taken, and of those equal to it the lowest ids.
    order = jnp.where(values > least, -1, jnp.where(values == least, ids, _NOBODY))
    _, places = jax.lax.top_k(-order, k)
    mine = (jnp.take_along_axis(array, places, axis=1) for array in (-values, ids))
    negative, ids = jax.lax.sort(tuple(mine), num_keys=2)
    return -negative, ids


def _candidates(
    x: jax.Array, packed: PackedArray, k: int, cap: float | None, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """Returns values and ids [M, 2 * k * 128] among which the k largest are."""
    given = operands(x, packed, more=2 * 2 * k * 64 * LANES * 4)
    each = pl.cdiv(given.blocks, PARTS)
    last = given.blocks - 1
    shape = (PARTS, k, given.rows, LANES)
    kept = pl.BlockSpec((None, *shape[1:]), lambda part, step: (part, 0, 0, 0))
    values, ids = pl.pallas_call(
        functools.partial(_kernel, given.lying, given.outputs, cap),
        name=NAME,
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape, jnp.int32)],
        grid=(PARTS, each),
        in_specs=given.specs(lambda part, step: (0, jnp.minimum(part * each + step, last))),
        out_specs=[kept, kept],
        compiler_params=parameters(given.memory, "parallel", "arbitrary"),
        cost_estimate=given.cost(),
        interpret=interpret,
    )(*given.arrays)  # fmt: skip

    def by_row(kept: jax.Array) -> jax.Array:
        return jnp.moveaxis(kept, 2, 0).reshape(given.rows, PARTS * k * LANES)

    return by_row(values), by_row(ids)


def _kernel(
    lying: Lying,
    vocab: int,
    cap: float | None,
    x: Any,
    words: Any,
    scale: Any,
    values: Any,
    ids: Any,
) -> None:
    part, step = pl.program_id(0), pl.program_id(1)
    block = words.shape[1 if lying.words_turned else 0]
    start = (part * pl.num_programs(1) + step) * block

    @pl.when(step == 0)
    def _first() -> None:
        values[...] = jnp.full_like(values, -jnp.inf)
        ids[...] = jnp.full_like(ids, _NOBODY)

    def some(first: Any) -> None:
        logits = capped(product(lying, x, words, scale, first), cap)
        own = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1) + (start + first)
        # Past the end of the table there is anything; a block that stands for one past the last has all its ids there.
        logits = jnp.where(own < vocab, logits, -jnp.inf)

        def put(place: Any, moving: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            value, own, moved = moving
            old, whose = values[place], ids[place]
            moved = moved | (value > old).astype(jnp.int32)
            here = moved != 0
            values[place] = jnp.where(here, value, old)
            ids[place] = jnp.where(here, own, whose)
            return jnp.where(here, old, value), jnp.where(here, whose, own), moved

        jax.lax.fori_loop(0, values.shape[0], put, (logits, own, jnp.zeros_like(own)))

    for_outputs(block, x.shape[0] * x.shape[2], some)
