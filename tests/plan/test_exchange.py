"""Seconds that messages take on the links of a torus, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from gemma_qat.compiled import Collective
from gemma_qat.plan.chips import topology_named
from gemma_qat.plan.exchange import seconds as duration


def message(kind: str, size: int, group: tuple[int, ...]) -> Collective:
    return Collective(kind=kind, bytes=size, count=1, group=group)


def test_seconds_on_a_torus_by_hand() -> None:
    """If it fails, wires are faster or slower than the formula above them says."""
    cube = topology_named("v5p:4x4x4")
    places = [tuple(int(n) for n in place) for place in np.ndindex(4, 4, 4)]

    def seconds(kind: str, group: tuple[int, ...]) -> float:
        return duration(message(kind, 64_000_000, group), cube, places)

    everyone, row, half = tuple(range(64)), (0, 1, 2, 3), (0, 1)
    assert seconds("all-gather", everyone) == pytest.approx(64e6 * 63 / 64 / 600e9)
    assert seconds("all-reduce", everyone) == pytest.approx(2 * 64e6 * 63 / 64 / 600e9)
    assert seconds("all-gather", row) == pytest.approx(64e6 * 3 / 4 / 200e9)
    assert seconds("reduce-scatter", half) == pytest.approx(64e6 / 2 / 100e9)  # no ring: one link
    assert seconds("all-to-all", row) == pytest.approx(64e6 / 200e9)
    assert seconds("collective-permute", row) == pytest.approx(64e6 / 100e9)
    assert seconds("all-gather", (7,)) == 0
    flat = topology_named("v5e:16x16")
    places = [tuple(int(n) for n in place) for place in np.ndindex(16, 16)]
    crossing = duration(message("all-to-all", 1_000_000, tuple(range(256))), flat, places)
    assert crossing == pytest.approx(
        1e6 * 16 / (8 * 50e9)
    )  # the middle of the torus, not the chips' own links
