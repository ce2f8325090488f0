"""Where arrays lie: shardings derived from logical axes and the rule table.

`Placement` is a mesh with a preset. It is handed down explicitly to whatever places activations (`constrain`) or moves
rows between devices itself (`cut_over`, `on_each_device`); where there is none, or its mesh is one device, nothing
happens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gemma_qat.errors import unknown
from gemma_qat.sharding.rules import BATCH_AXES, PRESETS, Axes

Logical = Sequence[str | None]
"""Logical axis of every dimension; None is never cut."""


def _cut(
    shape: Sequence[int], axes: Logical, units: Sequence[int], sizes: Mapping[str, int],
    *tables: Mapping[str, Axes],
) -> list[Axes]:  # fmt: skip
    """Returns the mesh axes each dimension is cut over: in order of preference, those that leave whole units.

    Each table in turn cuts with the mesh axes that those before it left.
    """
    left = [n // unit if n % unit == 0 else 1 for n, unit in zip(shape, units, strict=True)]
    found: list[Axes] = [()] * len(shape)
    used: set[str] = set()
    for table in tables:
        for i, axis in enumerate(axes):
            for target in table.get(axis or "", ()):
                size = sizes.get(target, 1)
                if target not in used and size > 1 and left[i] % size == 0:
                    found[i] += (target,)
                    left[i] //= size
                    used.add(target)
    return found


def partition(*entries: Any) -> PartitionSpec:
    """Returns the partition with one entry a dimension: a mesh axis, a tuple of them, or None; shortest form."""
    short = [e[0] if isinstance(e, tuple) and len(e) == 1 else e or None for e in entries]
    while short and short[-1] is None:
        short.pop()
    return PartitionSpec(*short)


def spec(
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    units: tuple[int, ...],
    mesh: Any,
    preset: str,
) -> PartitionSpec:
    """Returns the partition of a stored array: dimension i is named axes[i] and may be cut every units[i] elements.

    `mesh`: a mesh, or sizes alone (an abstract mesh). Arrays of one dimension are replicated.
    """
    if len(shape) < 2:
        return PartitionSpec()
    row = PRESETS[preset]
    return partition(*_cut(shape, axes, units, mesh.shape, row.stored, row.spare))


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh and the preset that says what lies where on it; hashable, so it can be static under jit."""

    mesh: Mesh
    preset: str

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise unknown("mesh preset", self.preset, PRESETS)

    def cut_over(self, name: str, length: int, *, stored: bool = False) -> Axes:
        """Returns the mesh axes that a dimension called `name` is cut over, in activations or in stored arrays."""
        table = PRESETS[self.preset].stored if stored else PRESETS[self.preset].activations
        return _cut((length,), (name,), (1,), self.mesh.shape, table)[0]

    def spec(self, shape: Sequence[int], axes: Logical) -> PartitionSpec:
        """Returns the partition of an activation."""
        table = PRESETS[self.preset].activations
        return partition(*_cut(shape, axes, (1,) * len(shape), self.mesh.shape, table))

    def shards(self, axes: Axes) -> int:
        """Returns how many shards a cut over these mesh axes makes."""
        return math.prod(self.mesh.shape[axis] for axis in axes)

    @property
    def platform(self) -> str:
        """What the mesh is made of: cpu, gpu, tpu. Not the host's default: programs are compiled for other machines."""
        return self.mesh.devices.flat[0].platform

    def on_each_device(
        self, body: Callable[..., Any], arriving: Any, leaving: Any, *, checked: bool = True
    ) -> Callable[..., Any]:
        """Returns `body` run by every device on its own shards, cut as `arriving` and `leaving` say.

        Not `checked`: that what is said to be the same on several devices is so is not proven, which jax cannot where
        kernels are called.
        """
        return jax.shard_map(
            body, mesh=self.mesh, in_specs=arriving, out_specs=leaving, check_vma=checked
        )


@dataclasses.dataclass(frozen=True)
class Cut:
    """How one stored array lies: the mesh axes that each of its dimensions is cut over."""

    placement: Placement
    axes: tuple[Axes, ...]

    def beside(self, name: str, length: int) -> Axes:
        """Returns what an activation's dimension called `name` is cut over, but for what the array is."""
        used = {axis for axes in self.axes for axis in axes}
        return tuple(axis for axis in self.placement.cut_over(name, length) if axis not in used)


def cut_of(where: Iterable[Any], dimensions: int, placement: Placement) -> Cut:
    """Returns the cut of an array of so many dimensions that lies as a partition's entries say."""
    axes = [(entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in where]
    return Cut(placement, (*axes, *((),) * (dimensions - len(axes))))


def constrain(x: jax.Array, axes: Logical, placement: Placement | None) -> jax.Array:
    """Returns `x` laid out as the preset says for activations with these logical axes; as it is without a placement.

    The gradient is laid out alike.
    """
    if placement is None or placement.mesh.size == 1:
        return x
    where = NamedSharding(placement.mesh, placement.spec(x.shape, axes))
    return jax.lax.with_sharding_constraint(x, where)


def varying(tree: Any, cut: Any, axes: Axes) -> Any:
    """Returns a tree of this device's shards, cut as `cut` says, marked as differing along `axes` too.

    Inside `on_each_device`. Where arrays are in fact the same along an axis their gradients are added up over it, and
    here is where: after all that the body does to gradients on the way out (a reduce-scatter, a loop), once, on the
    smallest array.
    """

    def one(x: jax.Array, where: PartitionSpec) -> jax.Array:
        known = {
            axis
            for entry in where
            for axis in ((entry,) if isinstance(entry, str) else entry or ())
        }
        missing = tuple(axis for axis in axes if axis not in known)
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(one, tree, cut)


def sharding(mesh: Any, partition: PartitionSpec) -> NamedSharding:
    """Returns the sharding of a partition on a mesh."""
    return NamedSharding(mesh, partition)


def replicated(mesh: Any) -> NamedSharding:
    """Returns the sharding of an array every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Any) -> NamedSharding:
    """Returns the sharding of a batch [B, T]: rows over every mesh axis that carries data."""
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
