"""Sets of rows in one stream, each as often as its weight says."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from gemma_qat.data import Blend, Rows, make_loader, pack
from gemma_qat.errors import InputError


def numbered(first: int, count: int) -> Rows:
    """Rows of 3 tokens that all say the row's id in the blend."""
    return pack([[i] * 3 for i in range(first, first + count)], 3)


@pytest.fixture(scope="module")
def blend() -> Blend:
    """Ids 0-6 three times as often as 7-17, and 18-22 half as often as those."""
    return Blend([numbered(0, 7), numbered(7, 11), numbered(18, 5)], [3.0, 1.0, 0.5])


def test_rows_are_found_by_id(blend: Blend) -> None:
    """Broken: a batch would hold another row than its id says, or in another order."""
    ids = np.array([20, 3, 7, 6, 18, 17, 0, 22])
    assert len(blend) == 23
    assert blend[ids].tokens[:, 0].tolist() == ids.tolist()
    assert blend[ids].segments.tolist() == [[1, 1, 1]] * 8


def test_every_set_has_its_share_at_any_time(blend: Blend) -> None:
    """Broken: a small set would be drowned out, or bunched at some time of the run."""
    loader = make_loader(blend, batch_size=3, seed=0)
    stream = [i for _ in range(60) for i in next(loader)["ids"].tolist()]
    owner = np.searchsorted([7, 18, 23], stream, side="right")
    for count in range(1, len(stream) + 1):
        shares = np.bincount(owner[:count], minlength=3)
        # Less than a row for each of the two choices: this set or the rest, then among the rest.
        assert np.abs(shares - count * np.array([3.0, 1.0, 0.5]) / 4.5).max() < 2
    assert np.bincount(owner).tolist() == [120, 40, 20]
    for part, (first, size) in enumerate(((0, 7), (7, 11), (18, 5))):
        own = np.array(stream)[owner == part].tolist()
        epochs = [own[start : start + size] for start in range(0, len(own) - size + 1, size)]
        assert all(sorted(epoch) == list(range(first, first + size)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > 1


def test_a_blend_resumes_by_id_on_other_hosts(blend: Blend) -> None:
    """Broken: the sets would drift apart after a resume."""
    whole = make_loader(blend, batch_size=6, seed=5)
    expected = [next(whole)["ids"].tolist() for _ in range(12)]
    halves = [
        make_loader(blend, batch_size=3, seed=5, shard_index=i, shard_count=2) for i in (0, 1)
    ]
    for _ in range(4):
        _ = [next(half) for half in halves]
    resumed = make_loader(blend, batch_size=6, seed=5, read_ahead=2)
    resumed.set_state(json.loads(json.dumps(halves[1].get_state())))
    assert [next(resumed)["ids"].tolist() for _ in range(8)] == expected[4:]


def test_an_epoch_ends_with_the_first_set_that_does() -> None:
    """Broken: a pass over a blend would repeat a row."""
    blend = Blend([numbered(0, 4), numbered(4, 9)], [1.0, 1.0])
    batches = [b["ids"].tolist() for b in make_loader(blend, batch_size=2, seed=0, num_epochs=1)]
    counts = Counter(i for batch in batches for i in batch)
    assert len(batches) == 4 and max(counts.values()) == 1
    assert sorted(i for i in counts if i < 4) == [0, 1, 2, 3]


def test_other_weights_are_another_order(blend: Blend) -> None:
    """Broken: a run resumed with another blend would go on as if nothing had changed."""
    state = make_loader(blend, batch_size=2, seed=0).get_state()
    other = Blend(blend.parts, [3.0, 1.0, 0.6])
    with pytest.raises(InputError, match=r"loader state: weights was \[3.0, 1.0, 0.5\]"):
        make_loader(other, batch_size=2, seed=0).set_state(state)


@pytest.mark.parametrize(
    ("parts", "weights", "message"),
    [
        ([numbered(0, 2)], [0.0], "expected more than 0"),
        ([numbered(0, 2)], [1.0, 2.0], "2 weights for 1 sets"),
        ([numbered(0, 2), numbered(2, 0)], [1.0, 1.0], "a set without rows"),
    ],
)
def test_an_impossible_blend_is_one_line(
    parts: list[Rows], weights: list[float], message: str
) -> None:
    """Broken: an empty set would fail inside Grain, a weight of 0 would divide by it."""
    with pytest.raises(InputError, match=message):
        Blend(parts, weights)
