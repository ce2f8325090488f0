"""Packing loses nothing, repeats nothing, and says where everything came from."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from gemma_qat.data import Rows, Source, Tokenizer, efficiency, pack, targets, tokenize


def numbered(sizes: list[int]) -> list[list[int]]:
    """Documents of the given sizes whose tokens are all different: 1, 2, 3, ..."""
    ends = np.cumsum(sizes).tolist()
    return [list(range(end - size + 1, end + 1)) for end, size in zip(ends, sizes, strict=True)]


def random_sizes(seed: int) -> list[int]:
    """Sizes from 0 to 40, every one likely to occur."""
    return np.random.default_rng(seed).integers(0, 41, 97).tolist()


def fields(rows: Rows) -> dict[str, np.ndarray]:
    """The arrays of some rows by name."""
    return {field.name: getattr(rows, field.name) for field in dataclasses.fields(rows)}


def test_a_small_case_by_hand() -> None:
    """Broken: the meaning of rows, segments, positions, documents or weights changed."""
    rows = pack([[11, 12, 13, 14, 15, 16, 17], [], [21, 22, 23], [31], [41, 42]], 5)
    assert rows.tokens.tolist() == [[11, 12, 13, 14, 15], [21, 22, 23, 16, 17], [41, 42, 31, 0, 0]]
    assert rows.segments.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 2, 2], [1, 1, 2, 0, 0]]
    assert rows.positions.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 0, 1], [0, 1, 0, 0, 0]]
    assert rows.documents.tolist() == [[0, 0, 0, 0, 0], [2, 2, 2, 0, 0], [4, 4, 3, -1, -1]]
    next_tokens, weights = targets(rows)
    assert next_tokens.tolist() == [[12, 13, 14, 15, 0], [22, 23, 0, 17, 0], [42, 0, 0, 0, 0]]
    assert weights.tolist() == [[1, 1, 1, 1, 0], [1, 1, 0, 1, 0], [1, 0, 0, 0, 0]]
    assert efficiency(rows) == 13 / 15
    assert rows.learn.tolist() == (rows.segments > 0).tolist()
    # What is not to be learned has no weight as a target; it is still read.
    asked = pack([[11, 12, 13, 14], [21, 22]], 6, learn=[[0, 0, 1, 1], [1, 0]])
    assert asked.tokens.tolist() == [[11, 12, 13, 14, 21, 22]]
    assert targets(asked)[0].tolist() == [[12, 13, 14, 0, 22, 0]]
    assert targets(asked)[1].tolist() == [[0, 1, 1, 0, 0, 0]]


def test_without_mixing_a_row_has_one_document() -> None:
    """Broken: a per-file evaluation would count another file's tokens."""
    rows = pack([[11, 12, 13, 14, 15, 16, 17], [], [21, 22, 23], [31]], 5, mix=False)
    assert rows.tokens.tolist() == [
        [11, 12, 13, 14, 15],
        [16, 17, 0, 0, 0],
        [21, 22, 23, 0, 0],
        [31, 0, 0, 0, 0],
    ]
    assert rows.documents.max(axis=1).tolist() == [0, 0, 2, 3]
    assert rows.segments.max() == 1


@pytest.mark.parametrize("mix", [True, False])
@pytest.mark.parametrize("length", [2, 7, 13, 64])
@pytest.mark.parametrize("seed", [0, 1])
def test_no_token_is_lost_or_repeated(seed: int, length: int, mix: bool) -> None:
    """Broken: training would skip text or see it twice an epoch."""
    documents = numbered(random_sizes(seed))
    rows = pack(documents, length, mix=mix)
    real = rows.segments > 0
    assert sorted(rows.tokens[real].tolist()) == list(range(1, sum(map(len, documents)) + 1))
    owner = {token: i for i, document in enumerate(documents) for token in document}
    expected = [owner[token] for token in rows.tokens[real].tolist()]
    assert rows.documents[real].tolist() == expected
    for array, padding in (
        (rows.tokens, 0),
        (rows.positions, 0),
        (rows.documents, -1),
        (rows.learn, 0),
    ):
        assert (array[~real] == padding).all()


@pytest.mark.parametrize("mix", [True, False])
def test_segments_are_runs_of_one_document(mix: bool) -> None:
    """Broken: attention or positions would cross from one document into another."""
    rows = pack(numbered(random_sizes(2)), 13, mix=mix)
    for tokens, segments, positions, documents in zip(
        rows.tokens, rows.segments, rows.positions, rows.documents, strict=True
    ):
        used = int((segments > 0).sum())
        assert (segments[:used] > 0).all(), "padding is at the end"
        assert np.unique(segments[:used]).tolist() == list(range(1, int(segments.max()) + 1))
        for segment in range(1, int(segments.max()) + 1):
            (at,) = np.nonzero(segments == segment)
            assert at.tolist() == list(range(at[0], at[0] + len(at)))
            assert positions[at].tolist() == list(range(len(at)))
            assert len(set(documents[at].tolist())) == 1
            assert (np.diff(tokens[at]) == 1).all(), "a piece is consecutive text"


def test_targets_match_a_naive_loop() -> None:
    """Broken: the loss would predict across documents, or padding."""
    rows = pack(numbered(random_sizes(3)), 11)
    next_tokens, weights = targets(rows)
    assert (next_tokens.dtype, weights.dtype) == (np.int32, np.float32)
    for m in range(len(rows)):
        for t in range(11):
            is_last = t == 10 or rows.segments[m, t + 1] != rows.segments[m, t]
            has_next = bool(rows.segments[m, t]) and not is_last
            assert weights[m, t] == has_next
            assert next_tokens[m, t] == (rows.tokens[m, t + 1] if has_next else 0)


def test_best_fit_leaves_little_padding() -> None:
    """Broken: tails would waste rows; best-fit decreasing promises 11/9 of the fewest, plus one."""
    sizes = [size for size in random_sizes(4) if size]
    rows = pack(numbered(sizes), 41)
    assert len(rows) <= 11 / 9 * -(-sum(sizes) // 41) + 1
    assert len(rows) < len(pack(numbered(sizes), 41, mix=False)) == len(sizes)
    # 6+4, 7+3, 5+5 fit exactly; first come, first served would open a fourth row.
    exact = pack(numbered([5, 4, 3, 5, 7, 6]), 10)
    assert len(exact) == 3 and efficiency(exact) == 1.0


def test_packing_is_deterministic_and_int32() -> None:
    """Broken: two hosts would hold different rows under the same number."""
    documents = numbered(random_sizes(5))
    first, again = fields(pack(documents, 9)), fields(pack([tuple(d) for d in documents], 9))
    for name, array in first.items():
        assert array.dtype == np.int32
        np.testing.assert_array_equal(array, again[name])


@pytest.mark.parametrize("documents", [[], [[], []]])
def test_nothing_packs_to_no_rows(documents: list[list[int]]) -> None:
    """Broken: an empty corpus would fail far from its cause."""
    rows = pack(documents, 8)
    assert rows.tokens.shape == (0, 8) and efficiency(rows) == 0.0
    assert targets(rows)[1].shape == (0, 8)


def test_a_row_without_targets_is_refused() -> None:
    """Broken: length 1 would train on nothing."""
    with pytest.raises(ValueError, match="length 1, expected at least 2"):
        pack([[1, 2]], 1)


def test_tokenize_marks_the_ends(tokenizer: Tokenizer) -> None:
    """Broken: documents would not start with bos and end with eos, or progress would be wrong."""
    records = [{"path": "a", "text": "x = 1\n"}, {"path": "b", "text": ""}]
    seen: list[tuple[str, int, int]] = []
    documents = tokenize(
        Source(items=records, read=dict), tokenizer, lambda *call: seen.append(call)
    )
    assert documents == [[2, *tokenizer.encode("x = 1\n"), 1], [2, 1]]
    assert seen == [("tokenize", 1, 2), ("tokenize", 2, 2)]
