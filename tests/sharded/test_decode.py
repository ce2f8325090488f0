"""Packed models over eight devices (`decode`: 2 x data, 4 x tensor): if a case fails, words or rows went astray."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

# See test_step.py: forward only, S = 13 L + 4 sums of at most n = 512 terms, two orders.
BOUND = 2 * (13 * 3 + 4) * math.sqrt(512) * 2.0**-24


def check(name: str, found: dict[str, Any]) -> None:
    """`mobile` rounds activations: one that falls the other way moves logits by steps, not by rounding errors."""
    print(name, found)
    assert found["off"] <= (BOUND if "mobile" not in name else 0.1)
    assert found["held"] < 0.45, (
        "matrices are cut in four; norms, and the parts that cannot be, are not"
    )
    backend = name.split()[2] if len(name.split()) > 2 else "blocked"
    assert {one.split()[1] for one in found["seen"]} == {backend}, (
        "the definition unpacks a whole weight"
    )
    assert "f32" in found["moved"] and not {"u8", "f16"} & set(found["moved"]), (
        "activations are; words are u8, scales f16"
    )


@pytest.fixture(scope="module")
def some(eight: Any) -> dict[str, Any]:
    return eight("on_decode.py", ["moe q4_0"])


def test_packed_experts_over_devices(some: Any, figures: Callable[..., Any]) -> None:
    found = figures(some["moe q4_0"])
    check("moe q4_0", found)
    assert found["seen"] == ["grouped_matmul blocked", "matmul blocked"]
    # 8 x 8 tokens choose 2 of 8 experts each.
    assert found["expert_load_mean"] == 16 and 16 < found["expert_load_max"] <= 64


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["dense q4_0", "dense q4_0 tpu", "dense q4_0 gpu", "e_series q4_0", "e_series mobile"]
)
def test_other_packed_models(name: str, eight: Any, figures: Callable[..., Any]) -> None:
    """Their tokens too; kernels for TPU and GPU interpreted. About 10 s of one core each, 30 s where interpreted."""
    check(name, figures(eight("on_decode.py", [name])[name]))
