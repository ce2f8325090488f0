"""The gradient of experts' matrices on TPU: for each group of rows, the sum of their outer products (Pallas).

The grid walks tiles of the result and, for each, the tiles of rows in order, those that hold rows of two groups once
for each. A group's sum stays in float32 in the chip's memory and is written once, in the dtype of the result. Groups
without rows are visited once, to write their zeros.

Which tile of rows is whose comes from `make_group_metadata` of jax's own grouped products (`megablox.gmm`), whose
`tgmm` does the same job; that one cannot be called where values differ along mesh axes (`jax.shard_map` with its
checks on), and reads its rows turned.

Source: Gale et al. 2023, "MegaBlocks" (arXiv 2211.15841), and the megablox kernels of jax.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.megablox.gmm import make_group_metadata

NAME = "grouped_outer_products"
"""What the kernel is called in a compiled program."""

LARGEST_TILE = 2**18
"""Elements of a tile of the result: 1 MiB of sums, within the 16 MiB a kernel may use beside tiles of rows."""


def outer_products(
    rows: jax.Array,
    d_out: jax.Array,
    group_sizes: jax.Array,
    like: jax.ShapeDtypeStruct,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Returns [E, R, O]: for each group the sum over its rows of rows^T d_out, summed in float32.

    Shapes: rows [C, R], d_out [C, O], sorted by group; group_sizes [E], their sum at most C. `like`: shape, dtype and
    (inside `shard_map`) varying axes of the result.
    """
    groups, width, out_width = like.shape
    count = rows.shape[0]
    tm = row_tile(count, groups)
    tr, to = result_tile(width, out_width)
    more = -count % tm
    rows = jnp.pad(rows, ((0, more), (0, 0)))
    # What arrives in float32 was rounded to the rows' dtype on its way: nothing is lost.
    d_out = jnp.pad(d_out.astype(rows.dtype), ((0, more), (0, 0)))
    tables, tiles = make_group_metadata(
        group_sizes=group_sizes.astype(jnp.int32), m=count + more, tm=tm, start_group=jnp.int32(0),
        num_nonzero_groups=groups, visit_empty_groups=True,
    )  # fmt: skip
    return pl.pallas_call(
        functools.partial(_kernel, tm),
        name=NAME,
        out_shape=like,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(out_width, to), pl.cdiv(width, tr), tiles),
            in_specs=[
                pl.BlockSpec((tm, tr), lambda o, r, i, tables: (tables[2][i], r)),
                pl.BlockSpec((tm, to), lambda o, r, i, tables: (tables[2][i], o)),
            ],
            out_specs=pl.BlockSpec((None, tr, to), lambda o, r, i, tables: (tables[1][i], r, o)),
            scratch_shapes=[pltpu.VMEM((tr, to), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * count * width * out_width,
            bytes_accessed=_traffic(rows, d_out, like, tr, to),
            transcendentals=0,
        ),
        interpret=interpret,
    )(tables, rows, d_out)


def row_tile(count: int, groups: int) -> int:
    """Returns the rows of a tile: fewer where groups are small, as a tile is read once for each group in it."""
    mean = count // groups
    return next((tile for tile in (512, 256) if mean >= 4 * tile), 128)


def result_tile(width: int, out_width: int) -> tuple[int, int]:
    """Returns the two sides of a tile of the result: whole where they fit, multiples of 128 that divide where not."""
    sides = [_side(width, 1024), _side(out_width, 1024)]
    while math.prod(sides) > LARGEST_TILE:
        larger = sides.index(max(sides))
        sides[larger] = _side((width, out_width)[larger], sides[larger] // 2)
    return sides[0], sides[1]


def _side(length: int, most: int) -> int:
    if length <= most:
        return length
    lanes = range(128, max(most, 128) + 1, 128)
    return max((n for n in lanes if length % n == 0), default=max(lanes))


def _traffic(
    rows: jax.Array, d_out: jax.Array, like: jax.ShapeDtypeStruct, tr: int, to: int
) -> int:
    _, width, out_width = like.shape
    read = rows.size * pl.cdiv(out_width, to) + d_out.size * pl.cdiv(width, tr)
    return read * rows.dtype.itemsize + math.prod(like.shape) * like.dtype.itemsize


def _kernel(tm: int, tables, rows, d_out, out, total) -> None:
    starts, groups, row_tiles = tables
    step = pl.program_id(2)
    last = pl.num_programs(2) - 1
    group = groups[step]
    start, end = starts[group], starts[group + 1]

    @pl.when((step == 0) | (groups[jnp.maximum(step - 1, 0)] != group))
    def _first_of_group() -> None:
        total[...] = jnp.zeros_like(total)

    @pl.when(start < end)
    def _add() -> None:
        # Rows of another group and rows past the last one add nothing, whatever is in them.
        place = jax.lax.broadcasted_iota(jnp.int32, (tm, 1), 0) + row_tiles[step] * tm
        mine = (place >= start) & (place < end)
        ours = jnp.where(mine, rows[...], jnp.zeros((), rows.dtype))
        theirs = jnp.where(mine, d_out[...], jnp.zeros((), d_out.dtype))
        total[...] += jax.lax.dot_general(
            ours, theirs, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )

    @pl.when((step == last) | (groups[jnp.minimum(step + 1, last)] != group))
    def _last_of_group() -> None:
        out[...] = total[...].astype(out.dtype)
