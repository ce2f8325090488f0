"""How one tensor becomes another of a different convention, and back: invertible moves.

Torch keeps a linear layer as [out, in] with the axes of heads merged; we keep reduced axes first and apart. A
move knows both directions and the foreign shape, so a map is data and can be tested there and back.

| move | foreign tensor |
|---|---|
| `SAME`, `MERGED_ROWS` | ours, or ours with all axes but the first merged |
| `LINEAR` | output axes merged, before the reduced axes merged |
| `transposed` | our axes in another order |
| `fused(move, i, n, axis)` | n of our arrays end to end along an axis that is there |
| `stacked(move, i, n, axis)` | n of our arrays side by side along an axis of its own |

`fused` and `stacked` take any move, themselves included.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from gemma_qat.quant.sites import Parameter


@dataclasses.dataclass(frozen=True)
class Move:
    """A pair of inverse conversions between a foreign tensor and one of our arrays."""

    name: str
    shape: Callable[[Parameter], tuple[int, ...]]
    """The foreign shape of a parameter."""
    read: Callable[[np.ndarray, Parameter], np.ndarray]
    write: Callable[[list[np.ndarray], Parameter], np.ndarray]
    """Takes our arrays (all `parts` that the foreign tensor holds, in order) and gives the foreign tensor."""
    part: int = 0
    """Which of the arrays in the foreign tensor this one is."""
    parts: int = 1
    """How many of our arrays the foreign tensor holds."""


def _two_axes(parameter: Parameter) -> tuple[int, int]:
    reduced = math.prod(parameter.shape[axis] for axis in parameter.reduced)
    return reduced, parameter.size // reduced


SAME = Move(
    "same", lambda p: p.shape, lambda x, p: x.reshape(p.shape), lambda parts, p: parts[0]
)  # fmt: skip
LINEAR = Move(
    "linear",
    lambda p: _two_axes(p)[::-1],
    lambda x, p: x.T.reshape(p.shape),
    lambda parts, p: parts[0].reshape(_two_axes(p)).T,
)
MERGED_ROWS = Move(
    "merged_rows",
    lambda p: (p.shape[0], math.prod(p.shape[1:])),
    lambda x, p: x.reshape(p.shape),
    lambda parts, p: parts[0].reshape(p.shape[0], -1),
)


def transposed(name: str, *axes: int) -> Move:
    """Returns the move to a tensor whose axes are ours in the order `axes`."""
    back = tuple(np.argsort(axes).tolist())
    return Move(
        name,
        lambda p: tuple(p.shape[axis] for axis in axes),
        lambda x, p: x.transpose(back),
        lambda parts, p: parts[0].transpose(axes),
    )


def stacked(move: Move, index: int, count: int, axis: int = 0) -> Move:
    """Returns the move to a tensor that holds `count` of `move`'s along a new axis, ours at `index`."""
    return Move(
        f"stacked_{move.name}",
        lambda p: (*move.shape(p)[:axis], count, *move.shape(p)[axis:]),
        lambda x, p: move.read(np.moveaxis(x, axis, 0)[index], p),
        lambda parts, p: np.stack(_each(move, parts, p), axis),
        part=index * move.parts + move.part,
        parts=count * move.parts,
    )


def fused(move: Move, index: int, count: int, axis: int) -> Move:
    """Returns the move to a tensor that holds `count` of `move`'s end to end along `axis`, ours at `index`."""
    return Move(
        f"fused_{move.name}",
        lambda p: _times(move.shape(p), axis, count),
        lambda x, p: move.read(np.split(x, count, axis)[index], p),
        lambda parts, p: np.concatenate(_each(move, parts, p), axis),
        part=index * move.parts + move.part,
        parts=count * move.parts,
    )


def _each(move: Move, parts: list[np.ndarray], parameter: Parameter) -> list[np.ndarray]:
    """The tensors of `move` that follow one another in a larger one."""
    starts = range(0, len(parts), move.parts)
    return [move.write(parts[start : start + move.parts], parameter) for start in starts]


def _times(shape: tuple[int, ...], axis: int, count: int) -> tuple[int, ...]:
    return (*shape[:axis], count * shape[axis], *shape[axis + 1 :])


_BLOCK = 256
"""Rows of a tensor that are transposed at a time: their columns stay in the cache while they are written."""


def contiguous(x: np.ndarray) -> np.ndarray:
    """Returns `x` in C order, itself where it is.

    Exactness: the same bits. numpy's own copy of a transposed matrix reads a cache line for every element.
    """
    steps = [step if size > 1 else x.nbytes for step, size in zip(x.strides, x.shape, strict=True)]
    inner, last = int(np.argmin(steps)) if steps else 0, x.ndim - 1
    if x.flags.c_contiguous:
        return x
    if inner == last:
        return np.ascontiguousarray(x)
    bits = x.view(f"u{x.itemsize}")
    out = np.empty(x.shape, bits.dtype)
    outer = [1 if axis in (inner, last) else size for axis, size in enumerate(x.shape)]
    for index in np.ndindex(*outer):
        at: list[slice | int] = list(index)
        at[inner] = slice(None)
        for start in range(0, x.shape[last], _BLOCK):
            at[last] = slice(start, start + _BLOCK)
            out[tuple(at)] = bits[tuple(at)]
    return out.view(x.dtype)


EXPERT = transposed("expert", 0, 2, 1)
EXPERT_FIRST_HALF = fused(EXPERT, 0, 2, axis=1)
EXPERT_SECOND_HALF = fused(EXPERT, 1, 2, axis=1)
