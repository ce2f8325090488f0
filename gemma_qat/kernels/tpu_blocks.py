"""How the TPU kernels cut a packed contraction into blocks, what those take of the chip's memory, and what is refused.

A row of words is never cut: the longest of Gemma 4 (21504 codes of 8 bits, 31B) times 128 outputs are 2.6 MiB. So a
block is a number of whole rows, sums need no second visit, and activations stay where they are for the whole call.
The last block may reach past the weight's end; what is read there is in outputs that are not written.

Which way an array lies is not the kernel's to choose, and to turn it costs more than the product: the TPU compiler
lays an argument so that least is lost to filling up 128 lanes, [2816, 352] turned, and a kernel that wants it the other
way gets a copy of the weight at every call. So words are taken turned where that is how they lie, and scales mostly
are: a row of them is seldom a multiple of 128.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from gemma_qat.kernels.problem import INTEGER, MANY_ROWS, Problem, axes_of, by_slots, first_of, flat
from gemma_qat.kernels.tpu_decode import CHUNK, LANES, Lying
from gemma_qat.numerics import Grid, PackedArray

BLOCK_BYTES = 2**19
"""Words of a block, about: 0.6 microseconds of a v5e's bandwidth, more than what a step of a kernel's loop costs."""

MEMORY = 48 * 2**20
"""What a kernel may ask of the memory beside the processor, in bytes."""

LEAST_MEMORY = 16 * 2**20
"""What a kernel has without asking."""


Index = Callable[..., tuple[Any, ...]]
"""Where a block is, from the step of a kernel's loop."""


def refuses(operation: str, problem: Problem) -> str | None:
    """Returns why the TPU kernels do not take a problem; None when they do."""
    grid = problem.grid
    if problem.rows > MANY_ROWS:
        return f"{problem.rows} rows, at most {MANY_ROWS}: bound by arithmetic"
    if not problem.slots:
        return f"{grid.format}: codes are spread over bytes"
    if grid.tile is not None and grid.tile & (grid.tile - 1):
        return f"tile {grid.tile}: a power of two expected, of which chunks hold whole ones"
    if problem.tile_bytes is not None and problem.tile_bytes % 8:
        return f"tile {grid.tile}: {problem.tile_bytes} bytes, a multiple of 8, a register's rows, expected"
    if operation in INTEGER:
        if problem.dtype != "int8":
            return f"codes of {problem.dtype}, int8 expected"
        if grid.tile is not None or grid.number.zero:
            return "integer sums need one scale for an output, and a code for zero"
        if pl.cdiv(problem.reduced, problem.slots) % 4:
            return f"rows of {problem.reduced} codes: whole numbers of 32 bits expected"
    elif problem.dtype not in ("float32", "bfloat16"):
        return f"activations of {problem.dtype}, float32 or bfloat16 expected"
    width = pl.cdiv(problem.reduced, problem.slots)
    need = memory(problem.rows, width, problem.outputs, grid, problem.dtype)
    if need > MEMORY:
        return f"{problem.rows} rows of {problem.reduced}: blocks of {need} bytes, at most {MEMORY}"
    return None


def words_lie_turned(packed: PackedArray) -> bool:
    """Returns whether words are taken with outputs along lanes: where the compiler lays them so, as fewer are wasted.

    Two axes of outputs cannot be merged along lanes without moving them, and are taken as they stand.
    """
    _, outputs, _ = axes_of(packed)
    width = packed.words.shape[-1]
    one = packed.words.shape[-2] == outputs
    return one and outputs * _up(width, LANES) > width * _up(outputs, LANES)


def scale_lies_turned(grid: Grid, tiles: int) -> bool:
    """Returns whether scales are taken with outputs along lanes: unless chunks cut their rows into whole registers."""
    return grid.tile != CHUNK // LANES or tiles % LANES != 0


def outputs_of_block(outputs: int, width: int) -> int:
    """Returns the outputs of a block: a multiple of 128, and such that blocks are of about the same size."""
    blocks = pl.cdiv(outputs * width, BLOCK_BYTES)
    return _up(pl.cdiv(outputs, blocks), LANES)


def memory(rows: int, width: int, outputs: int, grid: Grid, dtype: str, more: int = 0) -> int:
    """Returns the bytes a kernel takes on the chip, `more` among them, rows of arrays filled up to whole registers.

    Blocks are there twice, one being filled while the other is used.
    """
    block = outputs_of_block(outputs, width)
    item = jnp.dtype(dtype).itemsize
    x = 8 // grid.number.bits * _up(rows, 32 // item) * _up(width, LANES) * item
    words = block * _up(width, LANES)
    scales = block * (8 if grid.tile is None else _up(_tiles(grid, width), LANES)) * 4
    chunk = (
        6 * LANES * CHUNK * 4
    )  # what the compiler keeps of a chunk on its way to the product, about
    return 2 * (words + x + scales + _up(rows, 8) * block * 4) + chunk + more


def parameters(need: int, *semantics: Literal["parallel", "arbitrary"]) -> pltpu.CompilerParams:
    """Returns what the compiler is told: which steps may run in any order, and the memory."""
    return pltpu.CompilerParams(
        dimension_semantics=semantics, vmem_limit_bytes=max(need, LEAST_MEMORY)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operands:
    """What a kernel is called with: activations by slots, words, scales unless codes are summed; and their blocks."""

    arrays: tuple[jax.Array, ...]
    """x [P, M, W]; words [n, ...] as `flat` has them and scales of the same or of chosen experts, as they lie."""
    lying: Lying
    outputs: int
    block: int
    """Outputs of a block."""
    memory: int
    """Bytes of all blocks."""

    @property
    def blocks(self) -> int:
        """How many blocks the outputs make; the last may be short."""
        return pl.cdiv(self.outputs, self.block)

    @property
    def rows(self) -> int:
        """M."""
        return self.arrays[0].shape[1]

    def specs(self, at: Index, scales_at: Index | None = None) -> list[pl.BlockSpec]:
        """Returns the blocks of each operand.

        `at` gives the place in n and the number of outputs' block; `scales_at` those of scales if they differ.
        """
        x, _, *scale = self.arrays
        specs = [
            pl.BlockSpec(x.shape, lambda *step: (0, 0, 0)),
            self._spec(x.shape[2], self.lying.words_turned, at),
        ]
        if scale:  # taken 128 of a row at a time
            turned = self.lying.scale_turned
            length = scale[0].shape[-2 if turned else -1]
            length = length if self.lying.grid.tile is None else _up(length, LANES)
            specs.append(self._spec(length, turned, scales_at or at))
        return specs

    def _spec(self, length: int, turned: bool, at: Index) -> pl.BlockSpec:
        """Returns a block of one matrix's outputs with all of its other axis."""
        if turned:
            return pl.BlockSpec(
                (None, length, self.block), lambda *step: (at(*step)[0], 0, at(*step)[1])
            )
        return pl.BlockSpec((None, self.block, length), lambda *step: (*at(*step), 0))

    def cost(self, experts: int = 1) -> pl.CostEstimate:
        """Returns what a call does, for the compiler's scheduling."""
        x, *weight = self.arrays
        one = sum(math.prod(a.shape[-2:]) * a.dtype.itemsize for a in weight)
        codes = x.shape[0] * x.shape[2] * self.outputs
        out = 4 * self.rows * self.outputs
        return pl.CostEstimate(
            flops=2 * self.rows * codes * experts, transcendentals=0,
            bytes_accessed=experts * one + x.size * x.dtype.itemsize + out,
        )  # fmt: skip


def operands(
    x: jax.Array, packed: PackedArray, chosen: jax.Array | None = None, more: int = 0
) -> Operands:
    """Returns the operands of rows [M, R] with a packed weight; `more`: bytes of memory beside those of blocks.

    Scales are those of the one matrix, or of experts those at `chosen` places, in that order.
    """
    grid = packed.grid
    words, scale = flat(packed)
    # What is done to scales outside, widening them or turning them, is done to those that are wanted alone.
    places = first_of(packed)[None] if chosen is None else chosen
    if packed.layer is not None or chosen is not None:
        # Slices and no gather, which would have all scales, of other layers too, laid out in its own way first.
        some = [jax.lax.dynamic_slice_in_dim(scale, place, 1) for place in places]
        scale = jnp.concatenate(some)
    _, outputs, _ = axes_of(packed)
    width = words.shape[-1]
    lying = Lying(
        grid=grid, words_turned=words_lie_turned(packed),
        scale_turned=scale_lies_turned(grid, scale.shape[-1]),
    )  # fmt: skip
    if scale.dtype == jnp.float16:
        scale = jax.lax.bitcast_convert_type(scale, jnp.uint16)
    arrays: tuple[jax.Array, ...] = (by_slots(x, grid), words.mT if lying.words_turned else words)
    if x.dtype != jnp.int8:
        arrays = (*arrays, scale.mT if lying.scale_turned else scale)
    return Operands(
        arrays=arrays, lying=lying, outputs=outputs, block=outputs_of_block(outputs, width),
        memory=memory(x.shape[0], width, outputs, grid, x.dtype.name, more),
    )  # fmt: skip


def _tiles(grid: Grid, width: int) -> int:
    assert grid.tile is not None
    return width * 8 // grid.number.bits // grid.tile


def _up(n: int, multiple: int) -> int:
    return pl.cdiv(n, multiple) * multiple
