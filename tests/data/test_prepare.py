"""The standard library, end to end."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from gemma_qat.data import SPLITS, Prepared, Tokenizer, by_split, collect, prepare_stdlib, split_of

Calls = list[tuple[str, int, int]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where both calls below write."""
    return tmp_path_factory.mktemp("prepared")


@pytest.fixture(scope="module")
def calls() -> Calls:
    """What the first call reports while it works."""
    return []


@pytest.fixture(scope="module")
def prepared(folder: Path, calls: Calls) -> Prepared:
    """A part of the train split, all of the others."""

    def progress(description: str, done: int, total: int) -> None:
        calls.append((description, done, total))

    return prepare_stdlib(
        folder, vocab_size=512, length=64, max_train_bytes=300_000, progress=progress
    )


def test_the_same_call_gives_identical_arrays(prepared: Prepared, folder: Path) -> None:
    """Broken: a second run, or a second host, would train on other rows."""
    again = prepare_stdlib(folder, vocab_size=512, length=64, max_train_bytes=300_000)
    assert again.tokenizer.model == prepared.tokenizer.model
    assert (again.documents, again.bytes) == (prepared.documents, prepared.bytes)
    for split in SPLITS:
        for field in dataclasses.fields(prepared.rows[split]):
            first = getattr(prepared.rows[split], field.name)
            np.testing.assert_array_equal(first, getattr(again.rows[split], field.name))


def test_rows_are_the_documents(prepared: Prepared, folder: Path) -> None:
    """Broken: paths, byte counts and rows would not speak of the same text."""
    documents = collect()
    texts = {document.path: document.text for document in documents}
    tokenizer = Tokenizer.load(folder / "tokenizer.model")
    for split in ("validation", "test"):
        rows, paths = prepared.rows[split], prepared.documents[split]
        assert paths == [document.path for document in by_split(documents)[split]]
        assert prepared.bytes[split] == [len(texts[path].encode()) for path in paths]
        for index, path in enumerate(paths):
            ids = rows.tokens[rows.documents == index].tolist()
            assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
            assert tokenizer.decode(ids) == texts[path]


def test_splits_are_packed_for_their_use(prepared: Prepared) -> None:
    """Broken: training would waste rows, or a held-out row would mix two files."""
    assert {rows.tokens.shape[1] for rows in prepared.rows.values()} == {64}
    assert prepared.rows["train"].segments.max() > 1
    for split in ("validation", "test"):
        assert prepared.rows[split].segments.max() == 1
    used = prepared.rows["train"].segments > 0
    assert used.mean() > 0.99
    assert prepared.rows["train"].tokens.max() < prepared.tokenizer.vocab_size == 512


def test_a_part_of_the_train_split_is_kept(prepared: Prepared) -> None:
    """Broken: a small run would read everything, or nearly nothing."""
    assert 250_000 < sum(prepared.bytes["train"]) <= 300_000
    assert prepared.documents["train"] == sorted(prepared.documents["train"])
    assert {split_of(path) for path in prepared.documents["train"]} == {"train"}


def test_progress_reaches_its_total(prepared: Prepared, calls: Calls) -> None:
    """Broken: a progress bar would stand still or run over."""
    del prepared  # it fills `calls`
    steps = dict.fromkeys(description for description, _, _ in calls)
    assert list(steps) == [
        "collect",
        "train tokenizer",
        "tokenize train",
        "tokenize validation",
        "tokenize test",
    ]
    for step in steps:
        _, done, total = [call for call in calls if call[0] == step][-1]
        assert done == total > 0


def test_too_small_a_part_is_an_error(folder: Path, prepared: Prepared) -> None:
    """Broken: a run would start without a single train document."""
    del prepared  # the dataset exists
    with pytest.raises(ValueError, match="10 bytes hold none of the"):
        prepare_stdlib(folder, max_train_bytes=10)
