"""Where every leaf of the five sizes lies: the stored tables, and no tile or packed word on two devices."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SPECS = Path(__file__).with_name("specs")
STORED = [
    "12b q4_0", "26b_a4b q4_0", "31b q4_0", "e2b mobile", "e2b q4_0", "e4b q4_0",
]  # fmt: skip
WHOLE = [
    "e2b q4_0", "e4b q4_0", "12b q4_0", "26b_a4b q4_0", "31b q4_0",
    "12b q4_0_google", "e2b mobile", "26b_a4b mobile_like",
]  # fmt: skip
CASES = [*(f"stored {pair}" for pair in STORED), *(f"whole {pair}" for pair in WHOLE)]


@pytest.fixture(scope="module")
def found(eight: Any) -> dict[str, Any]:
    return eight("on_specs.py", CASES)


@pytest.mark.parametrize("pair", STORED)
def test_leaves_lie_as_stored(
    pair: str, found: dict[str, Any], figures: Callable[..., Any]
) -> None:
    """Whoever means to change a table writes it anew (`spec_tables.py`) and reads the difference."""
    assert figures(found[f"stored {pair}"]) == "stored"


@pytest.mark.parametrize("pair", WHOLE)
def test_no_tile_and_no_word_straddles_two_shards(
    pair: str, found: dict[str, Any], figures: Callable[..., Any]
) -> None:
    """Every kind of grid: tiles, super-blocks, whole channels, two to eight bits."""
    assert figures(found[f"whole {pair}"]) == "whole"


def test_every_table_is_compared() -> None:
    assert sorted(path.stem for path in SPECS.glob("*.json")) == [
        s.replace(" ", "_") for s in STORED
    ]


def test_experts_are_cut_by_expert_and_the_one_head_is_everywhere() -> None:
    """704 / 4 is not whole tiles of 32, and E2B has one KV head: neither is cut there."""
    experts, keys = (
        json.loads((SPECS / f"{name}_q4_0.json").read_text("utf-8")) for name in ("26b_a4b", "e2b")
    )
    assert experts["fsdp+expert"]["leaves"]["*/experts/down/kernel"] == ". expert+fsdp"
    assert "tensor" not in keys["fsdp+tensor"]["leaves"]["*/attn/k/kernel"]
