"""Where arrays lie: shardings derived from logical axes and the rule table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from gemma_qat.sharding.rules import BATCH_AXES, PRESETS


def spec(
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    units: tuple[int, ...],
    mesh: Any,
    preset: str,
) -> PartitionSpec:
    """Returns the partition of an array whose dimension i is named axes[i] and may be cut every units[i] elements."""
    table, used, out = PRESETS[preset], set(), []
    for length, axis, unit in zip(shape, axes, units, strict=True):
        target = table.get(axis or "")
        fits = (
            target is not None and target not in used and length % (unit * mesh.shape[target]) == 0
        )
        out.append(target if fits else None)
        used |= {target} if fits else set()
    while out and out[-1] is None:
        out.pop()
    return PartitionSpec(*out)


def sharding(mesh: Any, partition: PartitionSpec) -> NamedSharding:
    """Returns the sharding of a partition on a mesh."""
    return NamedSharding(mesh, partition)


def replicated(mesh: Any) -> NamedSharding:
    """Returns the sharding of an array every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Any) -> NamedSharding:
    """Returns the sharding of a batch [B, T]: rows over the data and fsdp axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def like_parameters(tree: Any, by_path: Mapping[str, NamedSharding], mesh: Any) -> Any:
    """Returns shardings for a tree that contains dicts keyed by parameter path (an optimizer state).

    A leaf under a known path lies like that parameter; every other leaf is replicated.
    """

    def one(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        for key in path:
            name = str(getattr(key, "key", ""))
            if name in by_path and leaf.ndim:
                return by_path[name]
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(one, tree)
