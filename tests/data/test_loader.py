"""The order of batches: deterministic, resumable, and the same for any number of shards."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from gemma_qat.data import Batch, Blend, Loader, Rows, RowSet, make_loader, pack, targets


def ids(batch: Batch) -> list[int]:
    """The number of each row of a batch; row i of the fixture starts with token 7 i + 1."""
    numbers = ((batch["tokens"][:, 0] - 1) // 7).tolist()
    assert numbers == batch["ids"].tolist()
    return numbers


def assert_equal(first: list[Batch], second: list[Batch]) -> None:
    """Every array of every batch is equal."""
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def take(loader: Loader, count: int) -> list[Batch]:
    """The next batches."""
    return [next(loader) for _ in range(count)]


def test_a_batch_holds_whole_rows() -> None:
    """Broken: targets or weights would belong to other rows than the tokens."""
    rows = pack([list(range(5)), [8, 9], [6], list(range(20, 33))], 6)
    batch = next(make_loader(rows, batch_size=len(rows), seed=3))
    types = {name: array.dtype.name for name, array in batch.items()}
    whole = dict.fromkeys(("tokens", "segments", "positions", "targets"), "int32")
    assert types == {**whole, "weights": "float32", "ids": "int64"}
    order = [rows.tokens.tolist().index(row) for row in batch["tokens"].tolist()]
    assert sorted(order) == list(range(len(rows)))
    picked = rows[np.array(order)]
    np.testing.assert_array_equal(batch["segments"], picked.segments)
    np.testing.assert_array_equal(batch["positions"], picked.positions)
    np.testing.assert_array_equal(batch["targets"], targets(picked)[0])
    np.testing.assert_array_equal(batch["weights"], targets(picked)[1])


@pytest.mark.parametrize("stop", [0, 1, 4, 5, 11])
def test_resume_equals_not_stopping(rows: Rows, stop: int) -> None:
    """Broken: a restarted run would skip or repeat text (23 rows in fives)."""
    straight = make_loader(rows, batch_size=5, seed=1)
    take(straight, stop)
    state = json.loads(json.dumps(straight.get_state()))
    expected = take(straight, 7)
    resumed = make_loader(rows, batch_size=5, seed=1)
    take(resumed, 2)  # setting a state also works on a loader that has moved
    resumed.set_state(state)
    assert resumed.get_state() == state
    assert_equal(take(resumed, 7), expected)
    straight.set_state(state)  # and backwards
    assert_equal(take(straight, 7), expected)


def test_fresh_loaders_agree_and_seeds_differ(rows: Rows) -> None:
    """Broken: a run could not be repeated, or the seed would do nothing."""
    first = take(make_loader(rows, batch_size=4, seed=5), 12)
    assert_equal(first, take(make_loader(rows, batch_size=4, seed=5), 12))
    other = take(make_loader(rows, batch_size=4, seed=6), 12)
    assert [ids(b) for b in first] != [ids(b) for b in other]


def test_each_epoch_has_each_row_once_in_another_order(rows: Rows) -> None:
    """Broken: some text would be seen more often than other text, or always in the same order."""
    stream = [i for b in take(make_loader(rows, batch_size=5, seed=0), 23) for i in ids(b)]
    epochs = [stream[start : start + 23] for start in range(0, 115, 23)]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5
    assert list(range(23)) not in epochs


@pytest.mark.parametrize("shard_count", [2, 3])
@pytest.mark.parametrize("num_epochs", [None, 1])
def test_shards_partition_the_global_batch(
    rows: Rows, shard_count: int, num_epochs: int | None
) -> None:
    """Broken: hosts would train on each other's rows, miss some, or stop at different steps."""
    whole = make_loader(rows, batch_size=2 * shard_count, seed=2, num_epochs=num_epochs)
    shards = [
        make_loader(
            rows,
            batch_size=2,
            seed=2,
            num_epochs=num_epochs,
            shard_index=index,
            shard_count=shard_count,
        )
        for index in range(shard_count)
    ]
    wholes = list(itertools.islice(whole, 40))
    parts = [list(itertools.islice(shard, 40)) for shard in shards]
    # Of the rows left over after one epoch, 3 of 4 or 5 of 6, shard 0 alone would have a batch.
    assert len(wholes) == (40 if num_epochs is None else 23 // (2 * shard_count))
    assert {len(part) for part in parts} == {len(wholes)}
    for step, batch in enumerate(wholes):
        assert [i for part in parts for i in ids(part[step])] == ids(batch)


def shards(rows: RowSet | Blend, batch_size: int, count: int) -> list[Loader]:
    """The loaders of a run on `count` hosts that take `batch_size` rows a step together."""
    return [
        make_loader(rows, batch_size=batch_size // count, seed=2, shard_index=i, shard_count=count)
        for i in range(count)
    ]


def train(loaders: list[Loader], steps: int) -> tuple[list[int], dict[str, object]]:
    """The ids that some hosts take in so many steps, in the order of the stream, and where they stop."""
    taken = [i for _ in range(steps) for one in loaders for i in ids(next(one))]
    states = [json.loads(json.dumps(one.get_state())) for one in loaders]
    assert all(state == states[0] for state in states)
    return taken, states[0]


@pytest.mark.parametrize(
    "runs",
    [
        [(4, 8, 3), (2, 8, 5)],
        [(2, 8, 2), (4, 8, 1), (1, 8, 6)],
        [(4, 8, 3), (2, 4, 2), (3, 6, 4), (1, 5, 3)],
    ],
    ids=["4 to 2 hosts", "2 to 4 to 1", "other batch sizes too"],
)
def test_hosts_may_come_and_go(rows: Rows, runs: list[tuple[int, int, int]]) -> None:
    """Broken: a run stopped on 4 hosts and continued on 2 would see a row twice, or never."""
    straight, _ = train(shards(rows, 1, 1), 80)
    seen: list[int] = []
    state: dict[str, object] | None = None
    for count, batch_size, steps in runs:  # hosts, rows a step over all of them, steps
        loaders = shards(rows, batch_size, count)
        for loader in loaders if state else []:
            loader.set_state(state)
        taken, state = train(loaders, steps)
        seen += taken
    assert seen == straight[: len(seen)]
    assert sorted(seen[:23]) == list(range(23)) and len(seen) > 46


@pytest.mark.parametrize(
    ("changed", "name"), [({"seed": 9}, "seed"), ({"num_epochs": 2}, "num_epochs")]
)
def test_a_state_of_another_order_is_refused(
    rows: Rows, changed: dict[str, int], name: str
) -> None:
    """Broken: a resumed run would go on in another order without a word."""
    state = make_loader(rows, batch_size=5, seed=1).get_state()
    with pytest.raises(ValueError, match=f"loader state: {name} was"):
        make_loader(rows, **{"batch_size": 5, "seed": 1, **changed}).set_state(state)


def test_a_state_of_other_rows_is_refused(rows: Rows) -> None:
    """Broken: a resumed run would go on over other text without a word."""
    state = make_loader(rows, batch_size=5, seed=1).get_state()
    with pytest.raises(ValueError, match=r"loader state: rows was \[23\] .*, is \[22\]"):
        make_loader(rows[:22], batch_size=5, seed=1).set_state(state)
    with pytest.raises(ValueError, match="loader state: digest was"):
        make_loader(rows[::-1], batch_size=5, seed=1).set_state(state)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batch_size": 24}, "batch size 24 is larger than the 23 rows"),
        ({"batch_size": 12, "shard_count": 2}, "batch size 12 on 2 shards .* the 23 rows"),
        ({"batch_size": 0}, "batch size 0"),
        ({"batch_size": 2, "num_epochs": 0}, "epochs 0"),
        ({"batch_size": 2, "shard_index": 2, "shard_count": 2}, "shard 2 of 2"),
        ({"batch_size": 2, "seed": -1}, "seed -1"),
    ],
)
def test_impossible_requests_are_one_line(rows: Rows, given: dict[str, int], message: str) -> None:
    """Broken: a wrong size would hang, give no batch, or fail inside Grain."""
    with pytest.raises(ValueError, match=message):
        make_loader(rows, **{"seed": 0, **given})


def test_reading_ahead_changes_nothing(rows: Rows) -> None:
    """Broken: rows that were read but not trained on would be skipped after a resume."""
    plain = make_loader(rows, batch_size=5, seed=0)
    ahead = make_loader(rows, batch_size=5, seed=0, read_ahead=3)
    assert_equal(take(ahead, 4), take(plain, 4))
    state = ahead.get_state()
    assert state == plain.get_state()
    expected = take(plain, 4)
    assert_equal(take(ahead, 4), expected)
    ahead.set_state(state)
    assert_equal(take(ahead, 4), expected)
