"""The mix under a budget: the best of all there are, within it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from gemma_qat.errors import InputError
from gemma_qat.evals import budget
from gemma_qat.evals.budget import best_mix, bytes_of

Table = list[list[float]]


def tables(seed: int, classes: int) -> tuple[Table, Table]:
    """Sizes and losses, the losses not in the order of the sizes."""
    generator = np.random.default_rng(seed)
    sizes = generator.integers(1, 60, (classes, 4)).astype(float)
    return sizes.tolist(), generator.random((classes, 4)).tolist()


def total(table: Table, chosen: tuple[int, ...] | list[int]) -> float:
    return sum(row[i] for row, i in zip(table, chosen, strict=True))


@pytest.mark.parametrize("seed", range(6))
def test_no_mix_within_the_budget_is_better(seed: int) -> None:
    """If it fails, a proposed recipe loses more than one of the same size need."""
    sizes, losses = tables(seed, 5)
    every = list(itertools.product(range(4), repeat=5))
    for capacity in (90.0, 130.0, 200.0, 1000.0):
        fits = [mix for mix in every if total(sizes, mix) <= capacity]
        if not fits:
            continue
        found = best_mix(sizes, losses, capacity)
        assert total(sizes, found) <= capacity
        assert total(losses, found) == pytest.approx(min(total(losses, m) for m in fits), abs=1e-12)


def test_the_budget_may_be_met_exactly() -> None:
    """If it fails, a mix of just the bytes that were asked for is refused."""
    sizes, losses = [[8.0, 3.0], [5.0, 2.0]], [[0.0, 1.0], [0.0, 1.0]]
    assert best_mix(sizes, losses, 13.0) == [0, 0]
    assert best_mix(sizes, losses, 5.0) == [1, 1]
    with pytest.raises(InputError, match="the smallest candidates of all classes are 5; give more"):
        best_mix(sizes, losses, 4.9)


def test_a_thinned_front_keeps_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """If it fails, studies by site, whose sums are too many to keep, propose worse than is promised."""
    sizes, losses = tables(3, 7)
    capacity = 180.0
    exact = best_mix(sizes, losses, capacity)
    monkeypatch.setattr(budget, "MOST", 40)
    found = best_mix(sizes, losses, capacity)
    assert total(sizes, found) <= capacity
    less = capacity - 7 * capacity / 40
    monkeypatch.undo()
    bound = total(losses, best_mix(sizes, losses, less))
    assert total(losses, exact) <= total(losses, found) <= bound


def test_bytes_by_name() -> None:
    """If it fails, a budget is another number of bytes than was written."""
    assert bytes_of("2.5GB", 1.0) == 2.5e9
    assert bytes_of("700 mb", 1.0) == 7e8
    assert bytes_of("0.25x", 400.0) == 100.0
    assert bytes_of("1234", 1.0) == 1234.0
    for text in ("", "x", "0x", "-1GB", "3 apples"):
        with pytest.raises(InputError, match="bytes such as 2.5GB"):
            bytes_of(text, 1.0)
