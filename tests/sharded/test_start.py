"""Starts on eight devices: if a case fails, a start is read whole by one device, changed, or calibrated otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

STARTS = ["hugging face", "converted", "native", "fresh", "packed"]
EXPORTED = "exported e_series mobile"
"""Codes of 2, 4 and 8 bits, per-layer inputs, and one head of keys and values, which cannot be cut."""


@pytest.fixture(scope="module")
def found(eight: Any) -> dict[str, Any]:
    return eight("on_start.py", [*STARTS, EXPORTED, "evaluated"])


@pytest.mark.parametrize("name", STARTS)
def test_a_start_is_the_same_and_nobody_holds_it_whole(
    name: str, found: dict[str, Any], figures: Callable[..., Any]
) -> None:
    """Bit for bit; what cannot be cut (norms, small projections of the tiny model) is held by all."""
    one = figures(found[name])
    print(name, one)
    # fsdp over four of the eight: a quarter, and what is not cut.
    assert one["differ"] == 0 and one["held"] < 0.35


def check_exported(one: dict[str, dict[str, float]]) -> None:
    """Every array has the bits that were written, and a device has its part of the words and scales, by bytes."""
    most = {"1": 1.0, "2, fsdp": 0.5, "2, tensor": 0.75, "8, fsdp": 0.125, "8, decode": 0.35}
    print(one)
    assert one.keys() == most.keys()
    for mesh, found in one.items():
        assert found["differ"] == 0 and found["arrays"] > 20, mesh
        assert found["held"] <= most[mesh], mesh


def test_an_export_is_the_same_on_one_two_and_eight_devices(
    found: dict[str, Any], figures: Callable[..., Any]
) -> None:
    """If it fails, what was exported on one machine is another model, or read whole, on the next."""
    check_exported(figures(found[EXPORTED]))


def test_measured_over_devices_it_is_the_same(
    found: dict[str, Any], figures: Callable[..., Any]
) -> None:
    """If it fails, a model that needs eight chips gets other figures than it would on one.

    Scores are sums of 160 terms of logits that two layers of sums over at most 512 terms made, logs below 16.
    """
    one = figures(found["evaluated"])
    print(one)
    assert one["tokens"] > 40 and one["kl"] > 1e-4
    assert one["apart"] < 16 * 160 * 2.0**-24


@pytest.mark.slow
@pytest.mark.parametrize("name", ["exported dense q4_0", "exported moe w4a16"])
def test_other_exports_on_one_two_and_eight_devices(
    name: str, eight: Any, figures: Callable[..., Any]
) -> None:
    """As above; a few seconds each beside the process."""
    check_exported(figures(eight("on_start.py", [name])[name]))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["dense", "moe"])
def test_calibration_runs_where_the_model_lies(
    family: str, eight: Any, figures: Callable[..., Any]
) -> None:
    """Summaries are histograms of 1/32 octave: an activation in the next bin moves a scale by no more than that."""
    name = f"calibrated {family}"
    one = figures(eight("on_start.py", [name])[name])
    print(family, one)
    assert one["scales"] > 0 and one["held"] < 0.35
    assert one["apart"] <= 2 ** (1 / 32) - 1
