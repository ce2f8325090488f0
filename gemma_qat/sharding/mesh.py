"""The device mesh: four axes inside a slice, two of which may also span slices.

Inside a slice devices talk over the chips' own links (ici), between slices over the data-center network (dcn). Every
mesh axis is the product of both parts, the dcn part outermost, so presets need not know: with `dcn_data=2` the `data`
axis is 2 x data long and only its outer half crosses slices.

    v5p, 4x4x4, one slice            MeshConfig()                                       fsdp 64
    v5p, 4x4x4, 26B A4B              MeshConfig(preset="fsdp+expert", expert=8)         fsdp 8 x expert 8
    two slices of 64                 MeshConfig(dcn_data=2)                             data 2 x fsdp 64

Devices of a topology description (ahead-of-time compilation, nothing attached) make a mesh like real ones.

Source: `jax.experimental.mesh_utils`, which lays logical axes along a TPU's torus. Devices that do not say which slice
they are in (CPU, GPU) are cut into equal consecutive blocks, one per slice: on GPUs consecutive devices share a host.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, Mesh

from gemma_qat.errors import InputError, unknown
from gemma_qat.sharding.rules import MESH_AXES, PRESETS


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How many devices lie along each mesh axis; -1 once, for the rest of a slice.

    Units: `data`, `fsdp`, `tensor`, `expert` count devices within a slice; `dcn_data` and `dcn_fsdp` count slices.
    """

    preset: str = "fsdp"
    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    expert: int = 1
    dcn_data: int = 1
    dcn_fsdp: int = 1

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise unknown("mesh preset", self.preset, PRESETS)

    @property
    def slices(self) -> int:
        """Number of slices."""
        return self.dcn_data * self.dcn_fsdp

    def inside(self, devices: int) -> tuple[int, ...]:
        """Returns the sizes of the mesh axes within one slice, for so many devices over all slices.

        Raises: InputError when the sizes do not multiply to the number of devices.
        """
        wanted = [getattr(self, axis) for axis in MESH_AXES]
        known = math.prod(size for size in wanted if size != -1)
        per_slice, over = divmod(devices, max(self.slices, 1))
        numbers = all(size == -1 or size > 0 for size in wanted)
        if not numbers or min(self.dcn_data, self.dcn_fsdp) < 1 or wanted.count(-1) > 1:
            raise InputError(
                f"mesh {self.sizes}: positive sizes expected, -1 for one of {', '.join(MESH_AXES)}"
            )
        if over or per_slice % known or (per_slice != known and -1 not in wanted):
            raise InputError(
                f"mesh {self.sizes}: {known * self.slices} devices (or a multiple, with one size -1) wanted, "
                f"{devices} there"
            )
        return tuple(per_slice // known if size == -1 else size for size in wanted)

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes as configured, by name."""
        names = (*MESH_AXES, "dcn_data", "dcn_fsdp")
        return {name: getattr(self, name) for name in names}


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns the mesh over `devices` (all of them by default), those of a topology description included.

    Raises: InputError when the sizes do not fit the devices, or the slices are not those of the devices.
    """
    devices = list(devices if devices is not None else jax.devices())
    return Mesh(device_grid(config, devices), MESH_AXES)


def device_grid(config: MeshConfig, devices: Sequence[Any]) -> np.ndarray:
    """Returns the devices in the shape of the mesh: neighbours along an axis are near, slices outermost."""
    inside, outside = config.inside(len(devices)), (config.dcn_data, config.dcn_fsdp, 1, 1)
    blocks = [_laid(inside, block) for block in _slices(devices, config)]
    grid = np.empty((*outside, *inside), dtype=object)
    for index, block in zip(np.ndindex(*outside), blocks, strict=True):
        grid[index] = block
    # [dcn_data, dcn_fsdp, 1, 1, data, fsdp, tensor, expert]: each dcn axis goes in front of its own ici axis.
    order = [axis for i in range(4) for axis in (i, i + 4)]
    shape = [outer * inner for outer, inner in zip(outside, inside, strict=True)]
    return grid.transpose(order).reshape(shape)


def abstract_mesh(config: MeshConfig, devices: int) -> Any:
    """Returns the mesh over so many devices as sizes alone: for specs, where no device is at hand."""
    sizes = dict(zip(MESH_AXES, config.inside(devices), strict=True))
    sizes["data"] *= config.dcn_data
    sizes["fsdp"] *= config.dcn_fsdp
    return AbstractMesh(tuple(sizes.values()), MESH_AXES)


def _slices(devices: Sequence[Any], config: MeshConfig) -> list[list[Any]]:
    numbers = sorted({getattr(device, "slice_index", 0) for device in devices})
    if len(numbers) > 1:
        if len(numbers) != config.slices:
            raise InputError(
                f"mesh {config.sizes}: {config.slices} slices wanted, {len(numbers)} there"
            )
        return [[d for d in devices if d.slice_index == number] for number in numbers]
    size = len(devices) // config.slices
    return [list(devices[i * size : (i + 1) * size]) for i in range(config.slices)]


def _laid(shape: tuple[int, ...], devices: list[Any]) -> np.ndarray:
    """Returns the devices of one slice in the shape of its axes, neighbours on the torus along an axis if possible."""
    try:
        return mesh_utils.create_device_mesh(shape, devices)
    except NotImplementedError:
        # No assignment of whole physical axes: an axis of the mesh then runs over parts of several.
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
