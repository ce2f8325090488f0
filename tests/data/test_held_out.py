"""What models are measured on: whole documents, each with a category, and only what the model says of conversations."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from gemma_qat.data import SYMBOLS, Tokenizer, targets, train_tokenizer
from gemma_qat.data.held_out import Corpus, held_out, kind_of
from gemma_qat.errors import InputError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    texts = ["user model thought one two three four five six seven eight", "answer: yes. no."]
    return train_tokenizer(texts, 295, tmp_path_factory.mktemp("t") / "t.model", SYMBOLS)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    for name, text in {"a/x.py": "one two " * 9, "b/y.py": "three", "z.md": "four five"}.items():
        file = tmp_path / "texts" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return tmp_path / "texts"


def test_folders_are_categories_and_documents_are_whole(texts: Path, tokenizer: Tokenizer) -> None:
    """If it fails, a document counts in the wrong category, or part of it is not measured."""
    found = held_out([Corpus(path=str(texts))], tokenizer, 8)
    files = sorted(p for p in texts.rglob("*") if p.is_file())
    assert found.categories == ("a", "b", "texts")
    assert [found.categories[i] for i in found.category] == ["a", "b", "texts"]
    for number, file in enumerate(files):
        ids = tokenizer.encode(file.read_text(), bos=True, eos=True)
        mine = found.rows[found.rows.documents[:, 0] == number]
        assert (mine.tokens[:, 0] == tokenizer.bos_id).all(), "the middle of a text without bos"
        wanted, weights = targets(mine)
        np.testing.assert_array_equal(wanted[weights > 0], ids[1:])
    assert found.dropped == 0 and found.format == "text"


def test_several_corpora_are_categories_by_name(texts: Path, tokenizer: Tokenizer) -> None:
    """If it fails, `NAME=PATH` does not name a category."""
    corpora = [
        Corpus(path=str(texts / "a"), name="code"),
        Corpus(path=str(texts / "b")),
        Corpus(path=str(texts / "z.md")),
    ]
    assert held_out(corpora, tokenizer, 8).categories == ("code", "b", "z.md")


def test_answers_alone_are_scored_and_records_name_their_category(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """If it fails, questions count in the perplexity of answers, or categories in records are not seen."""
    file = tmp_path / "talks.jsonl"
    talk = [{"role": "user", "content": "one two?"}, {"role": "assistant", "content": "yes."}]
    lines = [{"messages": talk, "kind": "short"}, {"messages": talk * 9, "kind": "long"}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    corpus = Corpus(path=str(file), format="chat", category="kind")
    found = held_out([corpus], tokenizer, 64)
    assert [found.categories[i] for i in found.category] == ["short", "long"]
    wanted, weights = targets(found.rows)
    first = found.rows.documents[:, 0] == 0
    said = tokenizer.decode(wanted[first][weights[first] > 0].tolist())
    assert said.replace("<turn|>", "").strip() == "yes."
    assert len(found.rows) == 2 and found.dropped > 0, (
        "what does not fit lacks what was asked, and is counted"
    )


def test_documents_without_a_byte_to_score_are_left_out(texts: Path, tokenizer: Tokenizer) -> None:
    """If it fails, an empty file among texts ends an evaluation, or moves the categories of those after it."""
    (texts / "a" / "__init__.py").write_text("")
    (texts / "c").mkdir()
    (texts / "c" / "__init__.py").write_text("")
    found = held_out([Corpus(path=str(texts))], tokenizer, 8)
    assert found.categories == ("a", "b", "texts")
    assert [found.categories[i] for i in found.category] == ["a", "b", "texts"]
    np.testing.assert_array_equal(found.scored_documents, [0, 1, 2])


def test_kinds_are_told_from_names(texts: Path, tmp_path: Path) -> None:
    """If it fails, JSON lines are measured as the text that they spell."""
    (tmp_path / "l.jsonl").write_text("{}")
    assert kind_of(tmp_path / "l.jsonl") == "jsonl"
    assert kind_of(texts) == kind_of(texts / "z.md") == "text"


def test_what_cannot_be_measured_is_refused(texts: Path, tokenizer: Tokenizer) -> None:
    """If it fails, an interval over one document is shown, or answers are averaged with texts."""
    alone = Corpus(path=str(texts / "z.md"))
    with pytest.raises(InputError, match="1 text given, at least 2"):
        held_out([alone], tokenizer, 8)
    (texts / "c").mkdir()
    (texts / "c" / "empty.md").write_text("")
    with pytest.raises(InputError, match="1 text given, at least 2"):
        held_out([alone, dataclasses.replace(alone, path=str(texts / "c"))], tokenizer, 8)
    with pytest.raises(InputError, match=r"two corpora are called z\.md; give each a name"):
        held_out([alone, alone], tokenizer, 8)
    with pytest.raises(InputError, match="one format"):
        held_out([alone, dataclasses.replace(alone, format="chat")], tokenizer, 8)
    with pytest.raises(FileNotFoundError, match="missing"):
        held_out([Corpus(path=str(texts / "missing"))], tokenizer, 8)
