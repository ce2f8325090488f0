"""Tokens go to their experts and come back, over eight devices: if a case fails, some are dropped or mixed up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from gemma_qat.nn.expert_parallel import exchange_bytes

CASES = [
    "exchange: all to one", "exchange: some empty", "exchange, then select: some empty",
    "gather: some empty", "ragged exchange: some empty", "few rows exchange: some empty",
]  # fmt: skip
MORE = [
    "exchange: spread", "exchange, all in eight: spread", "select: all to one",
    "ragged exchange: all to one", "packed exchange, then select: spread",
]  # fmt: skip


@pytest.fixture(scope="module")
def found(eight: Any) -> dict[str, Any]:
    return eight("on_experts.py", CASES)


@pytest.mark.parametrize("name", CASES)
def test_experts_over_devices_are_the_experts(
    name: str, found: dict[str, Any], figures: Callable[..., Any]
) -> None:
    """Values and gradients, fake-quantized in tiles of 32 where rows are multiplied, whatever tokens choose."""
    print(name, figures(found[name]))


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_in_more_ways(name: str, eight: Any, figures: Callable[..., Any]) -> None:
    """About 10 s of one core each."""
    print(name, figures(eight("on_experts.py", [name])[name]))


def test_the_memory_of_an_exchange() -> None:
    """26B A4B, 4096 tokens a device in bfloat16, eight ways: 8 x 32768 rows of 2816."""
    assert exchange_bytes(4096, 8, 2816, 8, 2) == 1_476_395_008
