"""Packed products over eight devices: if a case fails, a device multiplied what is not its own, or words moved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

CASES = [
    "outputs/blocked", "reduced/blocked", "reduced, off blocks/blocked", "integers/blocked", "head/blocked",
    "rows of the head/blocked", "reduced/tpu", "head/gpu",
]  # fmt: skip
MORE = [
    "reduced/gpu", "head/tpu",
    *(f"{name}/{backend}" for name in ("outputs", "integers") for backend in ("tpu", "gpu")),
    *(
        f"{name}/{backend}" for name in ("second output", "reduced and outputs")
        for backend in ("blocked", "tpu", "gpu")
    ),
]  # fmt: skip
ALONE = ["gradient", "compiled", "experts"]

BOUNDS = {"integers": 0.0, "head": 2.0**-19, "rows of the head": 2.0**-19}
"""What float32 sums in any order may be off is 1. Those of heads are of whole numbers: ids are equal, and logits up to
the last place of the soft cap, 30."""

SEEN = {
    "outputs": [4, 34, 64], "second output": [3, 12, 64], "reduced": [4, 33, 64], "integers": [4, 34, 64],
    "reduced and outputs": [2, 3, 32], "reduced, off blocks": [1, 16, 512], "head": [4, 40, 128],
    "rows of the head": [4, 160, 32],
}  # fmt: skip
"""Rows, outputs and reduced axis that a backend is chosen by: of one device. What no block ends at is gathered."""


def check(name: str, found: dict[str, Any]) -> None:
    print(name, found)
    kind = name.split("/")[0]
    assert found["off"] <= BOUNDS.get(kind, 1)
    assert found["seen"] == SEEN[kind]


@pytest.fixture(scope="module")
def some(eight: Any) -> dict[str, Any]:
    return eight("on_products.py", [*CASES, *ALONE])


@pytest.mark.parametrize("name", CASES)
def test_each_device_multiplies_what_it_holds(
    name: str, some: dict[str, Any], figures: Callable[..., Any]
) -> None:
    """Against float64; the largest logits, equal ones among them, as one device finds them."""
    check(name, figures(some[name]))


@pytest.mark.slow
def test_in_more_ways(eight: Any, figures: Callable[..., Any]) -> None:
    """Kernels for TPU and GPU interpreted. About 20 s of one core."""
    found = eight("on_products.py", MORE)
    for name in MORE:
        check(name, figures(found[name]))


def test_words_stay_where_they_are(some: dict[str, Any], figures: Callable[..., Any]) -> None:
    """One sum of partial sums, or the 2 largest logits of 4 devices; and no float weight is held, not even a part's."""
    found = figures(some["compiled"])
    moved = {name: one["moved"] for name, one in found.items()}
    assert moved == {
        "outputs": [], "reduced": [["all-reduce", "f32[1,64]"]],
        "head": [["all-gather", "f32[1,8]"], ["all-gather", "s32[1,8]"]],
    }  # fmt: skip
    assert all(2 * one["largest"] < one["part"] for one in found.values()), found


def test_the_gradient_is_that_of_one_device(
    some: dict[str, Any], figures: Callable[..., Any]
) -> None:
    """Sums of at most 8 x 64 numbers, of activations and of scales, relative to the largest."""
    found = figures(some["gradient"])
    assert found.keys() == {"x", "scale"} and max(found.values()) <= 8 * 64 * 2.0**-24


def test_what_cannot_be_cut_is_said(some: dict[str, Any], figures: Callable[..., Any]) -> None:
    """Experts outside `nn/expert_parallel.py`, as somebody who listens has them."""
    assert figures(some["experts"]) == ("blocked: arrays of 8 devices; reference takes it")
