"""Who holds what when several processes share a mesh: slices of stacks, and each process's share of a batch."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gemma_qat.errors import InputError
from gemma_qat.sharding.rules import BATCH_AXES


def of_slice(stacked: NamedSharding) -> NamedSharding:
    """Returns how x[i] lies when x lies so and its first axis is not split."""
    return NamedSharding(stacked.mesh, PartitionSpec(*stacked.spec[1:]))


def of_stack(single: NamedSharding) -> NamedSharding:
    """Returns how a stack of arrays lies when each lies so; the new first axis is not split."""
    return NamedSharding(single.mesh, PartitionSpec(None, *single.spec))


def from_host(array: np.ndarray, where: NamedSharding, dtype: Any = None) -> jax.Array:
    """Returns an array of which every process has the whole, placed so, as `dtype` if given.

    Each device is given its own part, converted by itself: no other device and no copy on the host holds the whole.
    """

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        return np.asarray(array[() if index is None else index], dtype or array.dtype)

    return jax.make_array_from_callback(array.shape, where, part)


def batch_parts(mesh: Any) -> int:
    """Returns into how many parts the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def batch_share(mesh: Mesh, process: int) -> tuple[int, int]:
    """Returns (index, count): which of `count` equal shares of a batch's rows the devices of a process hold.

    Processes along an axis that does not split the batch (tensor) hold the same share.
    Raises: InputError when processes hold shares that overlap in part.
    """
    parts: dict[int, set[int]] = {}
    others = [axis for axis in mesh.axis_names if axis not in BATCH_AXES]
    rows = mesh.devices.transpose([mesh.axis_names.index(axis) for axis in (*BATCH_AXES, *others)])
    for part, devices in enumerate(rows.reshape(batch_parts(mesh), -1)):
        for device in devices:
            parts.setdefault(device.process_index, set()).add(part)
    shares = sorted({tuple(sorted(held)) for held in parts.values()})
    if sum(map(len, shares)) != batch_parts(mesh) or len({len(share) for share in shares}) != 1:
        raise InputError(f"mesh {dict(mesh.shape)}: processes hold parts of a batch that overlap")
    return shares.index(tuple(sorted(parts[process]))), len(shares)
