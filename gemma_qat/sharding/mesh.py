"""The device mesh."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from gemma_qat.errors import InputError, unknown
from gemma_qat.sharding.rules import MESH_AXES, PRESETS


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How many devices lie along each mesh axis; -1 once, for the rest."""

    preset: str = "fsdp"
    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    expert: int = 1

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise unknown("mesh preset", self.preset, PRESETS)


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """Returns the mesh over `devices` (all of them by default).

    Raises: InputError when the sizes do not multiply to the number of devices.
    """
    devices = devices if devices is not None else jax.devices()
    sizes = [getattr(config, axis) for axis in MESH_AXES]
    known = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) > 1 or known < 1 or len(devices) % known:
        raise InputError(
            f"mesh {dict(zip(MESH_AXES, sizes, strict=True))}: does not fit {len(devices)} devices"
        )
    sizes = [len(devices) // known if size == -1 else size for size in sizes]
    if math.prod(sizes) != len(devices):
        raise InputError(
            f"mesh {dict(zip(MESH_AXES, sizes, strict=True))}: {math.prod(sizes)} devices wanted, {len(devices)} there"
        )
    return Mesh(np.asarray(devices).reshape(sizes), MESH_AXES)


def abstract_mesh(config: MeshConfig, devices: int) -> Any:
    """Returns the mesh over so many devices as sizes alone: for specs, where no device is at hand."""
    sizes = [getattr(config, axis) for axis in MESH_AXES]
    known = math.prod(size for size in sizes if size != -1)
    sizes = [devices // known if size == -1 else size for size in sizes]
    return AbstractMesh(tuple(sizes), MESH_AXES)
