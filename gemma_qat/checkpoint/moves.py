"""How one tensor becomes another of a different convention, and back: invertible moves.

Torch keeps a linear layer as [out, in] with the axes of heads merged; we keep reduced axes first and apart. A
move knows both directions and the foreign shape, so a map is data and can be tested there and back.
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
    """Takes our arrays (several where the foreign tensor fuses them) and gives the foreign tensor."""


def _two_axes(parameter: Parameter) -> tuple[int, int]:
    reduced = math.prod(parameter.shape[axis] for axis in parameter.reduced)
    return reduced, parameter.size // reduced


def _linear_shape(parameter: Parameter) -> tuple[int, ...]:
    return _two_axes(parameter)[::-1]


def _fused_shape(parameter: Parameter) -> tuple[int, ...]:
    E, D, F = parameter.shape
    return (E, 2 * F, D)


def _read_half(half: int) -> Callable[[np.ndarray, Parameter], np.ndarray]:
    def read(x: np.ndarray, parameter: Parameter) -> np.ndarray:
        F = parameter.shape[2]
        return np.swapaxes(x[:, half * F : (half + 1) * F], 1, 2)

    return read


def _write_halves(parts: list[np.ndarray], parameter: Parameter) -> np.ndarray:
    del parameter
    return np.concatenate([np.swapaxes(part, 1, 2) for part in parts], axis=1)


SAME = Move(
    "same", lambda p: p.shape, lambda x, p: x.reshape(p.shape), lambda parts, p: parts[0]
)  # fmt: skip
LINEAR = Move(
    "linear",
    _linear_shape,
    lambda x, p: x.T.reshape(p.shape),
    lambda parts, p: parts[0].reshape(_two_axes(p)).T,
)
MERGED_ROWS = Move(
    "merged_rows",
    lambda p: (p.shape[0], math.prod(p.shape[1:])),
    lambda x, p: x.reshape(p.shape),
    lambda parts, p: parts[0].reshape(p.shape[0], -1),
)
EXPERT = Move(
    "expert",
    lambda p: (p.shape[0], p.shape[2], p.shape[1]),
    lambda x, p: np.swapaxes(x, 1, 2),
    lambda parts, p: np.swapaxes(parts[0], 1, 2),
)
EXPERT_FIRST_HALF = Move("expert_first_half", _fused_shape, _read_half(0), _write_halves)
EXPERT_SECOND_HALF = Move("expert_second_half", _fused_shape, _read_half(1), _write_halves)
