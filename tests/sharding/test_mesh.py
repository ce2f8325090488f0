"""Meshes from configs: sizes, slices, and devices that are only described."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from gemma_qat.errors import InputError
from gemma_qat.sharding import MESH_AXES, MeshConfig, abstract_mesh, make_mesh
from gemma_qat.sharding.mesh import device_grid


@dataclasses.dataclass(frozen=True)
class Described:
    """A device of a topology description, as far as a mesh asks it."""

    id: int
    slice_index: int = 0
    platform: str = "cpu"
    device_kind: str = "described"
    process_index: int = 0


def laid(config: MeshConfig, devices: list[Any]) -> Any:
    """Numbers of the devices in the order of the mesh."""
    return np.vectorize(lambda device: device.id)(device_grid(config, devices))


def test_the_rest_goes_where_the_config_says() -> None:
    assert MeshConfig().inside(64) == (1, 64, 1, 1)
    assert MeshConfig(fsdp=4, tensor=-1, data=2).inside(64) == (2, 4, 8, 1)
    assert MeshConfig(preset="fsdp+expert", expert=8, dcn_data=2).inside(128) == (1, 8, 1, 8)


def test_one_device_is_a_mesh() -> None:
    assert dict(make_mesh(MeshConfig()).shape) == dict.fromkeys(MESH_AXES, 1)
    assert make_mesh(MeshConfig(), jax.devices()[:1]).devices.flat[0] == jax.devices()[0]


def test_slices_are_the_outer_half_of_an_axis() -> None:
    """If it fails, messages that were to stay inside a slice cross the slow network."""
    devices = [Described(i) for i in range(8)]
    grid = laid(MeshConfig(dcn_data=2, tensor=2), devices)
    assert grid.shape == (2, 2, 2, 1)
    np.testing.assert_array_equal(grid[0].reshape(4), [0, 1, 2, 3])
    inner = laid(MeshConfig(dcn_fsdp=2, data=2, fsdp=2), devices)
    assert inner.shape == (2, 4, 1, 1)
    np.testing.assert_array_equal(inner[:, :, 0, 0], [[0, 1, 4, 5], [2, 3, 6, 7]])


def test_devices_that_know_their_slice_are_believed() -> None:
    devices = [Described(i, slice_index=i % 2) for i in range(8)]
    grid = laid(MeshConfig(dcn_data=2), devices)
    np.testing.assert_array_equal(grid[:, :, 0, 0], [[0, 2, 4, 6], [1, 3, 5, 7]])
    with pytest.raises(InputError, match="1 slices wanted, 2 there"):
        laid(MeshConfig(), devices)


def test_sizes_alone_are_those_of_the_mesh() -> None:
    config = MeshConfig(dcn_data=2, dcn_fsdp=2, tensor=2)
    grid = laid(config, [Described(i) for i in range(32)])
    assert tuple(abstract_mesh(config, 32).shape.values()) == grid.shape == (2, 8, 2, 1)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (MeshConfig(fsdp=3), "3 devices .* wanted, 8 there"),
        (MeshConfig(fsdp=4), "4 devices .* wanted, 8 there"),
        (MeshConfig(tensor=-1), "-1 for one of data, fsdp, tensor, expert"),
        (MeshConfig(tensor=0), "positive sizes expected"),
        (MeshConfig(dcn_data=3), "3 devices .* wanted, 8 there"),
        (MeshConfig(dcn_data=-1), "positive sizes expected"),
    ],
)
def test_what_does_not_fit_is_said(config: MeshConfig, said: str) -> None:
    with pytest.raises(InputError, match=said):
        config.inside(8)


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(InputError, match=r"fsdp\+tensor"):
        MeshConfig(preset="fsdp+tensr")
