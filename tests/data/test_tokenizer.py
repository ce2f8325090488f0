"""Special ids, losslessness, determinism and errors of the tokenizer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hard_texts import HARD

from gemma_qat.data import Piece, SentencePieceTokenizer, Tokenizer, train_tokenizer
from gemma_qat.data.tokenizer import Kind


@pytest.mark.parametrize("text", HARD)
def test_decode_returns_the_text(tokenizer: Tokenizer, text: str) -> None:
    """Broken: source code would change on its way through training (spaces, newlines, forms)."""
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    # Text never yields a control or unknown id, whatever it spells.
    assert all(id > 4 for id in ids)


def test_any_unicode_survives(tokenizer: Tokenizer) -> None:
    """Broken: some character outside the vocabulary would be lost."""
    codes = np.random.default_rng(0).integers(0, 0x110000, 3000)
    text = "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_ids_are_gemmas(tokenizer: Tokenizer) -> None:
    """Broken: exports and prompts made for Gemma's ids would mean something else."""
    pieces = tokenizer.pieces()
    assert [piece.text for piece in pieces[:6]] == ["<pad>", "</s>", "<s>", "<unk>", "<mask>", "\n"]
    ids = (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id, tokenizer.unk_id)
    assert ids == (0, 1, 2, 3)
    assert tokenizer.encode("a", bos=True, eos=True) == [2, *tokenizer.encode("a"), 1]
    assert tokenizer.decode([0, 2, *tokenizer.encode("a b"), 1, 0]) == "a b"


def test_pieces_say_what_they_are(tokenizer: Tokenizer) -> None:
    """Broken: a GGUF file would carry wrong token types, and others would decode wrongly."""
    pieces = tokenizer.pieces()
    kinds = [piece.kind for piece in pieces]
    assert len(pieces) == tokenizer.vocab_size == 330
    assert kinds[:6] == ["control", "control", "control", "unknown", "control", "user_defined"]
    assert kinds[6:262] == ["byte"] * 256 and set(kinds[262:]) == {"normal"}
    assert [piece.text for piece in pieces[6:262]] == [f"<0x{byte:02X}>" for byte in range(256)]
    assert "\u2581\u2581\u2581\u2581" in {piece.text for piece in pieces[262:]}
    scores = [piece.score for piece in pieces[262:]]
    assert scores == sorted(scores, reverse=True) and scores[0] > scores[-1]


def test_digits_and_newlines_stand_alone(tokenizer: Tokenizer) -> None:
    """Broken: numbers would be learned as words, or a line's end as part of its last word."""
    texts = [tokenizer.pieces()[id].text for id in tokenizer.encode("10045\n\n")]
    assert texts == ["1", "0", "0", "4", "5", "\n", "\n"]


def test_training_is_deterministic_and_loads(
    tmp_path: Path, tokenizer: Tokenizer, capfd: pytest.CaptureFixture[str]
) -> None:
    """Broken: two hosts would disagree on ids, the file would differ, or training would chatter."""
    texts = ["one two three four five six\n" * 3, "    two  three\n\nten " + "long " * 2000]
    first = train_tokenizer(texts, 290, tmp_path / "a" / "tokenizer.model")
    again = train_tokenizer(iter(texts), 290, tmp_path / "b.model")
    assert first.model == again.model == (tmp_path / "b.model").read_bytes()
    assert Tokenizer.load(tmp_path / "b.model").pieces() == first.pieces()
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["b.model"]
    # Lines longer than SentencePiece's default limit are learned from too.
    assert "\u2581long" in {piece.text for piece in first.pieces()}
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("content", [b"", b"plain text, not a model" * 9, bytes(range(256))])
def test_a_file_of_another_kind_is_one_line(tmp_path: Path, content: bytes) -> None:
    """Broken: a wrong path would crash inside SentencePiece with its C++ source line."""
    path = tmp_path / "wrong.model"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"^tokenizer [^\n]*wrong.model: expected a Sentence"):
        Tokenizer.load(path)
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such file$"):
        Tokenizer.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("texts", "vocab_size"), [(["abc def"], 5000), (["abc def"], 100), ([], 300), ([""], 300)]
)
def test_an_impossible_vocabulary_is_one_line(
    tmp_path: Path, texts: list[str], vocab_size: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """Broken: too little text or too few ids would end in a C++ error, or a broken file."""
    with pytest.raises(ValueError, match=rf"vocabulary of {vocab_size}: \w[^\n]*$"):
        train_tokenizer(texts, vocab_size, tmp_path / "tokenizer.model")
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


class _Made(SentencePieceTokenizer):
    """A model whose pieces are given."""

    def pieces(self) -> list[Piece]:
        """Pieces with ids out of the order of their scores, and two cuts of one."""
        rows: list[tuple[str, float, Kind]] = [
            ("<s>", 0.0, "control"), ("ab", -2.0, "normal"), ("abc", -3.0, "normal"),
            ("bc", -1.0, "normal"), ("a", -4.0, "normal"), ("b", -5.0, "normal"),
            ("c", -6.0, "normal"), ("<0x61>", 0.0, "byte"),
        ]  # fmt: skip
        return [Piece(*row) for row in rows]


def test_merge_order_and_cuts(tokenizer: SentencePieceTokenizer) -> None:
    """Broken: merges come in the order of ids rather than of scores, or a cut is missing."""
    merges = _Made(tokenizer.model).merges()
    assert merges == [("b", "c"), ("a", "b"), ("ab", "c"), ("a", "bc")]
