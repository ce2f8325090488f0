"""A packed contraction as every backend sees it: rows of activations times rows of packed words.

    x [M, R]      words uint8 [O, W]      scale [O, Q]            ->  [M, O]
    x [C, R]      words uint8 [E, O, W]   scale [E, O, Q]         ->  [C, O]     rows sorted by expert

O are a weight's output axes, merged, R its reduced ones. Byte w of a row holds 8 / bits codes, one in each *slot*; the
activation laid out by slots, [P, M, W], multiplies codes where they sit (`Layout.slots`):

    y[m, o] = sum over slots p and bytes w of   x[p, m, w] * (code[p, o, w] - zero) * scale[o, w // bytes of a tile]
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from gemma_qat.numerics import Grid, PackedArray, layout_named
from gemma_qat.numerics.tiles import split_axes

MANY_ROWS = 64
"""Above so many rows a contraction is bound by arithmetic, and the weight is unpacked once for all of them."""

INTEGER = ("integer_matmul", "integer_grouped_matmul")
"""Operations that sum products of codes: scales are for the caller to multiply."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """The shape of a contraction, which is what a backend is chosen by."""

    rows: int
    """M, or C with experts."""
    outputs: int
    reduced: int
    grid: Grid
    dtype: str
    """Of the activation: float32, bfloat16, or int8 for codes."""
    experts: int = 0
    devices: int = 1
    """That hold the arrays together; kernels see those of one (`devices.py`)."""

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.grid.number.bits

    @property
    def tile_bytes(self) -> int | None:
        """Bytes of words that share a scale; None: a whole row does."""
        return None if self.grid.tile is None else self.grid.tile * self.bits // 8

    @property
    def slots(self) -> int:
        """Codes of a byte; 0 where codes are spread over bytes or tiles do not fill whole ones."""
        fmt = self.grid.number
        spread = layout_named(fmt.layout, fmt.bits).slots is None
        ragged = self.grid.tile is not None and self.grid.tile * fmt.bits % 8
        return 0 if spread or ragged else 8 // fmt.bits

    @property
    def weight_bytes(self) -> int:
        """Bytes of words and scales that have to be read once (of the experts that are chosen, all of them)."""
        return math.ceil(
            max(self.experts, 1) * self.outputs * self.reduced * self.grid.bits_per_weight(self.reduced) / 8
        )  # fmt: skip


def axes_of(packed: PackedArray) -> tuple[int, int, int]:
    """Returns (experts or 0, O, R) of a weight: [R..., O...], experts [E, R, O], or a table [V, D]."""
    lead, reduced, trail = split_axes(packed.shape, packed.reduced)
    if not trail:  # a table: what it gives is one number a row
        return 0, math.prod(lead), reduced
    return math.prod(lead) if lead else 0, math.prod(trail), reduced


def flat(packed: PackedArray) -> tuple[jax.Array, jax.Array]:
    """Returns (words [n, O, W], scale [n, O, Q]): n is E of experts, L of a stack of layers, L E of both, else 1.

    Nothing moves; `first_of` says where in n the weight begins.
    """
    _, outputs, _ = axes_of(packed)
    words = packed.words.reshape(-1, outputs, packed.words.shape[-1])
    return words, packed.scale.reshape(-1, outputs, packed.scale.shape[-1])


def first_of(packed: PackedArray) -> jax.Array:
    """Returns the place, int32, of a weight's only or first matrix among those of `flat`."""
    experts, _, _ = axes_of(packed)
    layer = jnp.int32(0) if packed.layer is None else packed.layer
    return layer * max(experts, 1)


def problem_of(lhs: jax.Array, packed: PackedArray) -> Problem:
    """Returns the problem of contracting an activation's last axes with a packed weight's reduced ones."""
    experts, outputs, reduced = axes_of(packed)
    free = lhs.shape[: lhs.ndim - len(packed.reduced)]
    return Problem(
        rows=math.prod(free), outputs=outputs, reduced=reduced, grid=packed.grid,
        dtype=lhs.dtype.name, experts=experts,
        devices=1 if packed.cut is None else packed.cut.placement.mesh.size,
    )  # fmt: skip


def as_rows(lhs: jax.Array, packed: PackedArray) -> tuple[jax.Array, tuple[int, ...]]:
    """Returns (the activation as [M, R], the shape of its product with a weight that is no experts')."""
    lead, reduced, trail = split_axes(packed.shape, packed.reduced)
    free = lhs.shape[: lhs.ndim - len(packed.reduced)]
    return lhs.reshape(math.prod(free), reduced), (*free, *(trail or lead))


def by_slots(x: jax.Array, grid: Grid) -> jax.Array:
    """Returns activations [M, R] as [P, M, W]."""
    fmt = grid.number
    slots = layout_named(fmt.layout, fmt.bits).slots
    assert slots is not None  # refused before: `Problem.slots`
    return slots(x, fmt.bits)


def codes_in(words: jax.Array, grid: Grid, slot: int) -> jax.Array:
    """Returns the codes in one slot of bytes, as int32 around 0: what a scale multiplies, but for a zero of a half.

    In registers: a shift, a mask and a subtraction; `words` int32 or uint8.
    """
    fmt = grid.number
    wide = words.astype(jnp.int32)
    code = (wide >> (fmt.bits * slot)) & (2**fmt.bits - 1)
    return code + (fmt.code_min - math.floor(fmt.zero))


def half(grid: Grid) -> float:
    """Returns what is to be subtracted from `codes_in` still: 0, or the half of a grid that has no zero."""
    return grid.number.zero - math.floor(grid.number.zero)
