"""Attention of one token a row over a cache of codes on TPU: each code is read once and made a float on the chip.

Which way codes lie is not the kernel's to choose (`tpu_blocks`): the compiler lays a cache [B, S, K, H] so that few of
a tile's rows are empty, and a kernel that wants it otherwise gets a copy of the whole cache at every token.

    K up to 2    [B, K, S, H]: each head of keys and values is multiplied with its own queries
    K from 4 on  [B, S, K, H]: a block's slots and heads are merged, all queries are multiplied with all rows, and of
                 the scores [K G, S K] those of other heads are masked. The MXU is filled with rows of keys for few
                 queries anyway; what is done in vain is the softmax of K - 1 of K scores, few beside H codes each.

The grid walks blocks of slots, from the first that a row of the batch sees to its last; steps left over stay at that
one, whose codes are there already, and do nothing. How many steps there are is data too, so that a cache with room for
all positions costs what is written to it. Of a stack of layers' caches a block is one layer's.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float

from gemma_qat.kernels.cached import Cached, cached_of, numbers, parts_seen, weights_of
from gemma_qat.kernels.reference import MASKED
from gemma_qat.kernels.tpu_blocks import BLOCK_BYTES, MEMORY, parameters
from gemma_qat.kernels.tpu_decode import LANES
from gemma_qat.numerics.cache_codes import Coded

NAME = "attend_codes"
"""What the kernel is called in a compiled program."""

APART = 2
"""Heads up to which the compiler lays each one's slots together."""

CHUNK = 2**17
"""Codes that are made floats at a time, about."""


def refuses(problem: Cached) -> str | None:
    """Returns why the kernel does not take a problem; None when it does."""
    if problem.dtype not in ("float32", "bfloat16"):
        return f"queries of {problem.dtype}, float32 or bfloat16 expected"
    if problem.heads > APART and LANES % problem.heads:
        return (
            f"{problem.heads} heads of keys, up to {APART} or a power of two up to {LANES} expected"
        )
    need = Cut.of(problem).memory
    if need > MEMORY:
        return f"{problem.heads} heads of {problem.width}: blocks of {need} bytes, at most {MEMORY}"
    return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut:
    """How a cache is cut into blocks."""

    problem: Cached
    chunk: int
    """Slots that are multiplied at a time; 128 rows of codes or a multiple."""
    chunks: int
    """Of a block."""

    @classmethod
    def of(cls, problem: Cached) -> Cut:
        """Returns the cut of a problem: blocks of about the same size, no longer than the cache."""
        each = 1 if problem.heads <= APART else problem.heads
        chunk = _up(max(CHUNK // (each * problem.width), 1), LANES)
        chunk = min(chunk, _up(problem.slots, LANES))
        most = max(1, BLOCK_BYTES // (problem.heads * problem.row * chunk))
        count = pl.cdiv(problem.slots, chunk)
        return cls(problem=problem, chunk=chunk, chunks=pl.cdiv(count, pl.cdiv(count, most)))

    @property
    def apart(self) -> bool:
        """Whether each head is multiplied by itself."""
        return self.problem.heads <= APART

    @property
    def slots(self) -> int:
        """Of a block."""
        return self.chunk * self.chunks

    @property
    def merged(self) -> int:
        """Heads whose rows of codes are multiplied together."""
        return 1 if self.apart else self.problem.heads

    @property
    def queries(self) -> tuple[int, int, int]:
        """(Parts that are multiplied apart, queries of each, H)."""
        parts = self.problem.heads // self.merged
        return parts, self.merged * self.problem.group, self.problem.width

    @property
    def memory(self) -> int:
        """Bytes of blocks, each of which is there twice, and of a chunk as floats of two kinds."""
        parts, queries, width = self.queries
        head = _up(self.problem.heads, 4) if not self.apart else parts
        codes = 2 * self.slots * head * _up(self.problem.row, LANES)
        scales = 3 * _up(self.problem.heads, 8) * self.slots * 4
        q = 2 * parts * _up(queries, 8) * _up(width, LANES) * 4
        chunk = self.chunk * _up(self.merged, 8) * (width * 4 + _up(queries, 8) * 4) * 3
        return 2 * (codes + scales + q) + q + chunk


def attend(
    q: Float[Array, "B K G H"],
    keys: Coded,
    values: Coded,
    visible: Bool[Array, "B S"],
    layer: Any = None,
    *,
    interpret: bool = False,
) -> Float[Array, "B K G H"]:
    """Returns the attention output, float32; zeros for a row that sees nothing."""
    problem = cached_of(q, keys)
    cut = Cut.of(problem)
    bounds = parts_seen(visible, cut.slots)
    blocks = pl.cdiv(problem.slots, cut.slots)
    # Of slots past the end of the cache, of which the last block may have some, there is anything to read.
    seen = jnp.pad(visible.astype(jnp.int32), ((0, 0), (0, blocks * cut.slots - problem.slots)))

    def at(row: Any, step: Any, bounds: Any) -> Any:
        return jnp.maximum(jnp.minimum(bounds[row, 0] + step, bounds[row, 1]), 0)

    def of_codes(b: Any, i: Any, bounds: Any, layer: Any) -> tuple[Any, ...]:
        block = at(b, i, bounds)
        return (layer[0], b, 0, block, 0) if cut.apart else (layer[0], b, block, 0, 0)

    block = (problem.heads, cut.slots) if cut.apart else (cut.slots, problem.heads)
    codes = pl.BlockSpec((None, 1, *block, problem.row), of_codes)
    scales = pl.BlockSpec(
        (None, 1, problem.heads, cut.slots),
        lambda b, i, bounds, layer: (layer[0], b, 0, at(b, i, bounds)),
    )
    marks = pl.BlockSpec((1, 1, cut.slots), lambda b, i, bounds, layer: (b, 0, at(b, i, bounds)))
    whole = pl.BlockSpec((1, *cut.queries), lambda b, i, bounds, layer: (b, 0, 0, 0))
    parts, queries, _ = cut.queries

    def laid(coded: Coded) -> tuple[jax.Array, jax.Array]:
        stack = coded if layer is not None else jax.tree.map(lambda x: x[None], coded)
        codes = jnp.moveaxis(stack.codes, 3, 2) if cut.apart else stack.codes
        return codes, jnp.moveaxis(stack.scale, 3, 2)

    steps = jnp.maximum(jnp.max(bounds[:, 1] - bounds[:, 0]) + 1, 1)
    out = pl.pallas_call(
        functools.partial(_kernel, cut),
        name=NAME,
        out_shape=jax.ShapeDtypeStruct((problem.batch, *cut.queries), jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(problem.batch, steps),
            in_specs=[whole, codes, scales, codes, scales, marks],
            out_specs=whole,
            scratch_shapes=[
                pltpu.VMEM((parts, queries, 1), jnp.float32),
                pltpu.VMEM((parts, queries, 1), jnp.float32),
            ],
        ),
        compiler_params=parameters(cut.memory, "parallel", "arbitrary"),
        interpret=interpret,
    )(
        bounds,
        jnp.reshape(jnp.asarray(0 if layer is None else layer, jnp.int32), (1,)),
        q.reshape(problem.batch, *cut.queries),
        *laid(keys),
        *laid(values),
        seen[:, None, :],
    )
    return out.reshape(q.shape)


def _kernel(
    cut: Cut, bounds: Any, layer: Any, q: Any, keys: Any, key_scale: Any, values: Any,
    value_scale: Any, seen: Any, out: Any, most: Any, total: Any,
) -> None:  # fmt: skip
    del layer  # which layer's blocks arrive here
    row, step = pl.program_id(0), pl.program_id(1)

    @pl.when(step == 0)
    def _first() -> None:
        most[...] = jnp.full_like(most, MASKED)
        total[...] = jnp.zeros_like(total)
        out[...] = jnp.zeros_like(out)

    @pl.when(bounds[row, 0] + step <= bounds[row, 1])
    def _add() -> None:
        def chunk(number: Any, carry: None) -> None:
            for part in range(cut.queries[0]):
                slots = pl.ds(pl.multiple_of(number * cut.chunk, cut.chunk), cut.chunk)
                _part(cut, part, slots, q, keys, key_scale, values, value_scale, seen,
                      out, most, total)  # fmt: skip

        jax.lax.fori_loop(0, cut.chunks, chunk, None)

    @pl.when(step == pl.num_programs(1) - 1)
    def _last() -> None:
        whole = total[...]
        out[0] = out[0] / jnp.where(whole > 0, whole, 1.0)


def _part(
    cut: Cut, part: int, slots: Any, q: Any, keys: Any, key_scale: Any, values: Any,
    value_scale: Any, seen: Any, out: Any, most: Any, total: Any,
) -> None:  # fmt: skip
    """Adds a chunk of slots to the sums of the queries of one part."""
    problem = cut.problem
    length = cut.chunk * cut.merged

    def floats(codes: Any) -> tuple[jax.Array, ...]:
        if cut.apart:
            words = codes[0, part, slots]
        else:  # merged where they lie: in registers it takes three times as long
            every = codes.reshape(cut.slots * problem.heads, problem.row)
            first = pl.multiple_of(slots.start * problem.heads, length)
            words = every[pl.ds(first, length)]
        signed = jax.lax.bitcast_convert_type(words, jnp.int8).astype(jnp.int32)
        return numbers(signed, problem.bits, problem.dtype)

    def scale(scales: Any) -> jax.Array:
        if cut.apart:
            return scales[0, pl.ds(part, 1), slots]
        near = scales[0, :, slots]  # of every head, and wanted for each of its queries
        near = jnp.broadcast_to(near[:, None], (problem.heads, problem.group, cut.chunk))
        return _of_rows(cut, near.reshape(rows, cut.chunk))

    queries = q[0, part]
    rows = queries.shape[0]
    seen = jnp.broadcast_to(seen[0, :, slots], (rows, cut.chunk))
    ours = _of_rows(cut, seen) > 0
    if not cut.apart:
        shape = (rows, length)
        head = jax.lax.rem(_iota(shape, 1), jnp.full(shape, problem.heads, jnp.int32))
        wanted = jax.lax.div(_iota(shape, 0), jnp.full(shape, problem.group, jnp.int32))
        ours = ours & (head == wanted)
    scores = jnp.zeros((rows, length), jnp.float32)
    for place, key in enumerate(floats(keys)):
        width = key.shape[1]
        scores += _dot(queries[:, place * width : (place + 1) * width], key, 1)
    scores = scores * scale(key_scale)
    weights, now, before = weights_of(scores, ours, most[part])
    most[part] = now
    total[part] = total[part] * before + jnp.sum(weights, axis=1, keepdims=True)
    scaled = jnp.where(ours, weights * scale(value_scale), 0.0)
    scaled = scaled.astype(queries.dtype)
    for place, value in enumerate(floats(values)):
        width = value.shape[1]
        there = pl.ds(place * width, width)
        out[0, part, :, there] = out[0, part, :, there] * before + _dot(scaled, value, 0)


def _of_rows(cut: Cut, x: jax.Array) -> jax.Array:
    """Returns what is given for slots [queries, chunk] for each row of codes, of which a slot has one a head merged."""
    if cut.apart:
        return x
    each = LANES // cut.merged
    lanes = _iota((x.shape[0], LANES), 1)
    own = jax.lax.div(lanes, jnp.full_like(lanes, cut.merged))
    return jnp.concatenate(
        [
            jnp.take_along_axis(x[:, first : first + LANES], own + at, axis=1, mode="promise_in_bounds")
            for first in range(0, cut.chunk, LANES)
            for at in range(0, LANES, each)
        ],
        axis=1,
    )  # fmt: skip


def _iota(shape: tuple[int, ...], axis: int) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _dot(x: jax.Array, codes: jax.Array, axis: int) -> jax.Array:
    """Returns x [M, n] times codes, summed over their `axis`; float32 with all its bits."""
    whole = x.dtype == jnp.float32
    return jax.lax.dot_general(
        x, codes, (((1,), (axis,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if whole else jax.lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )  # fmt: skip


def _up(n: int, multiple: int) -> int:
    return pl.cdiv(n, multiple) * multiple
