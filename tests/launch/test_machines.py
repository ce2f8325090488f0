"""Machines by name: what a launcher asks for is what a plan was made for."""

from __future__ import annotations

import pytest

from gemma_qat.cli.main import main
from gemma_qat.errors import InputError
from gemma_qat.launch.machines import RENTED, machine_named
from gemma_qat.plan import CHIPS, GPUS


def test_every_chip_can_be_rented() -> None:
    """If it fails, a plan can be made for a chip that no launcher knows."""
    assert set(RENTED) == {*CHIPS, *GPUS}


@pytest.mark.parametrize(
    ("name", "hosts", "per_host", "kind"),
    [
        ("v5p:4x4x4", 16, 4, "ct5p-hightpu-4t"),
        ("v5e:1x1", 1, 1, "ct5lp-hightpu-1t"),
        ("v5e:2x4", 1, 8, "ct5lp-hightpu-8t"),
        ("v6e:16x16", 64, 4, "ct6e-standard-4t"),
        ("h100:8", 1, 8, "a3-highgpu-8g"),
        ("a100:4x2", 4, 2, "a2-ultragpu-2g"),
    ],
)
def test_hosts(name: str, hosts: int, per_host: int, kind: str) -> None:
    """If it fails, a job asks for a number of hosts that its slice does not have."""
    machine = machine_named(name)
    assert (machine.hosts, machine.chips_per_host, machine.machine_type) == (hosts, per_host, kind)


@pytest.mark.parametrize("chip", CHIPS)
def test_every_slice_has_hosts(chip: str) -> None:
    """If it fails, a slice that can be rented has no machine type."""
    for shape in CHIPS[chip].shapes:
        machine = machine_named(f"{chip}:{shape}")
        assert machine.hosts * machine.chips_per_host == machine.place.devices
        assert machine.machine_type in RENTED[chip].types.values()


def test_several_slices() -> None:
    """If it fails, a run over slices is planned for the chips, or rented by the type, of another number of them."""
    one, two = machine_named("v5e:4x8"), machine_named("v5e:4x8", 2)
    assert (two.hosts, two.place.devices) == (2 * one.hosts, 2 * one.place.devices)
    assert two.name == "2 x v5e:4x8" and two.chip == "v5e" and two.topology == "4x8"
    assert two.accelerator_type == one.accelerator_type == "v5litepod-32"
    for name, slices, said in (
        ("h100:4x8", 2, "only TPUs have slices"),
        ("v5e:4x8", 0, "0 slices"),
    ):
        with pytest.raises(InputError, match=said):
            machine_named(name, slices)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v4:2x2x1", "unknown chip 'v4'"),
        ("v5p:3x3x3", "unknown topology"),
        ("h100:4x", "nodes x GPUs of a node expected, such as h100:4x8"),
        ("h100", "nodes x GPUs of a node expected"),
    ],
)
def test_a_machine_that_is_none(name: str, said: str) -> None:
    """If it fails, a mistyped machine is found out on the cluster."""
    with pytest.raises(InputError, match=said):
        machine_named(name)


def test_scripts_read_it(capsys: pytest.CaptureFixture[str]) -> None:
    """If it fails, a launch script gets no number of hosts."""
    assert main(["launch", "machine", "v5p:4x4x4"]) == 0
    said = dict(line.split("=") for line in capsys.readouterr().out.splitlines())
    assert said["HOSTS"] == "16" and said["ACCELERATOR_TYPE"] == "v5p-128"
