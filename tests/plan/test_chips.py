"""Topologies by name: what they are made of, and what is said to a wrong one."""

from __future__ import annotations

import pytest

from gemma_qat.errors import InputError
from gemma_qat.plan import CHIPS, topology_named

BIDIRECTIONAL = {"v5p": 1200e9, "v5e": 400e9, "v6e": 800e9}


@pytest.mark.parametrize(
    ("name", "devices", "accelerator"),
    [("v5p:4x4x4", 64, "v5p-128"), ("v5e:4x4", 16, "v5litepod-16"), ("v6e:16x16", 256, "v6e-256")],
)
def test_a_slice_by_name(name: str, devices: int, accelerator: str) -> None:
    """If it fails, the compiler is told of another machine than the one asked for."""
    found = topology_named(name)
    assert (found.name, found.devices, found.accelerator_type) == (name, devices, accelerator)


@pytest.mark.parametrize("name", CHIPS)
def test_links_add_up_to_the_documented_bandwidth(name: str) -> None:
    """If it fails, the bandwidth of a link does not agree with the chip's."""
    chip = CHIPS[name]
    assert 2 * 2 * chip.dimensions * chip.link == BIDIRECTIONAL[name]


@pytest.mark.parametrize("name", CHIPS)
def test_every_slice_of_the_table_is_one(name: str) -> None:
    """If it fails, a suggestion made to a person is refused when it is followed."""
    for shape in CHIPS[name].shapes:
        assert len(topology_named(f"{name}:{shape}").shape) == CHIPS[name].dimensions


def test_rings() -> None:
    """If it fails, a message is given links that a slice does not have."""
    assert [CHIPS["v5p"].closes(n) for n in (2, 4, 8)] == [False, True, True]
    assert [CHIPS["v5e"].closes(n) for n in (4, 8, 16)] == [False, False, True]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("v5:4x4", "unknown chip 'v5'.*v5p"),
        ("v5p:4x4", "nearest slices of v5p: .*v5p:4x4x4"),
        ("v5e:4x5", "v5e:4x4"),
        ("v6e", "v6e:1x1"),
        ("v5p:4x4x-1", "nearest"),
    ],
)
def test_a_wrong_name_is_told_the_nearest(name: str, says: str) -> None:
    """If it fails, a typing error ends in the compiler's own words, or in none."""
    with pytest.raises(InputError, match=says):
        topology_named(name)
