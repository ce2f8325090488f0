"""Starts on eight devices: if a case fails, a start is read whole by one device, changed, or calibrated otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

STARTS = ["hugging face", "converted", "native", "fresh", "packed"]


@pytest.fixture(scope="module")
def found(eight: Any) -> dict[str, Any]:
    return eight("on_start.py", STARTS)


@pytest.mark.parametrize("name", STARTS)
def test_a_start_is_the_same_and_nobody_holds_it_whole(
    name: str, found: dict[str, Any], figures: Callable[..., Any]
) -> None:
    """Bit for bit; what cannot be cut (norms, small projections of the tiny model) is held by all."""
    one = figures(found[name])
    print(name, one)
    # fsdp over four of the eight: a quarter, and what is not cut.
    assert one["differ"] == 0 and one["held"] < 0.35


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
