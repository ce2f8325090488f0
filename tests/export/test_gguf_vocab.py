"""The vocabulary in a GGUF file, checked by tokenizing with nothing but what the file holds."""

from __future__ import annotations

import itertools
from pathlib import Path

import gguf
import pytest

from gemma_qat.data.sentencepiece_model import SentencePieceTokenizer, train_tokenizer
from gemma_qat.data.tokenizer import Piece, Tokenizer
from gemma_qat.errors import InputError
from gemma_qat.export import export_gguf
from gemma_qat.export.gguf_tokenizer import tokenizer_files
from gemma_qat.export.gguf_vocab import vocabulary_keys

TEXTS = [
    "the cat sat on the mat and the hat sat on the cat\n",
    "a quick brown fox jumps over the lazy dog, then the dog barks at the fox\n",
    "numbers 12 and 345 are not words; wordless wonders wander westward\n",
] * 4


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    """A small byte-fallback BPE tokenizer."""
    return train_tokenizer(TEXTS, 384, tmp_path_factory.mktemp("tokenizer") / "t.model")


@pytest.fixture(scope="module")
def keys(case, tokenizer, tmp_path_factory) -> dict:
    """The key/values of a file exported with it, by gguf-py's reader."""
    config = case.smallest(vocab_size=384, per_layer_vocab=384)
    path: Path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    export_gguf(case.artifact(config, tokenizer=tokenizer), path)
    return {n: f.contents() for n, f in gguf.GGUFReader(path).fields.items()}


def _bpe(text: str, keys: dict) -> list[int]:
    """Byte-pair encoding by rank, as llama.cpp's: the pair of lowest rank first, leftmost on ties."""
    ids = {piece: i for i, piece in enumerate(keys["tokenizer.ggml.tokens"])}
    joined = [tuple(m.split(" ")) for m in keys["tokenizer.ggml.merges"]]
    ranks = {pair: i for i, pair in enumerate(joined)}
    parts = list(text.replace(" ", "\u2581"))
    while True:
        pairs = [(ranks[p], i) for i, p in enumerate(itertools.pairwise(parts)) if p in ranks]
        if not pairs:
            break
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    found: list[int] = []
    for part in parts:
        fallback = [ids[f"<0x{byte:02X}>"] for byte in part.encode()]
        found += [ids[part]] if part in ids else fallback
    return found


@pytest.mark.parametrize(
    "text", ["the cat", "a fox jumps westward, wandering 345 times", "caf\u00e9 hat", "zzz  the"]
)
def test_merges_tokenize_alike(text, tokenizer, keys):
    """If this fails, llama.cpp cuts a text into other tokens than training did."""
    assert _bpe(text, keys) == tokenizer.encode(text)


def test_runs_of_spaces_and_lines_that_are_symbols(tmp_path: Path) -> None:
    """If this fails, llama.cpp cuts indented code otherwise than training did: Gemma has its runs as user-defined pieces."""
    symbols = [*("\u2581" * n for n in range(2, 9)), *("\n" * n for n in range(2, 5)), "\t"]
    spaced = [text.replace(" ", "  ") for text in TEXTS]
    own = train_tokenizer([*TEXTS, *spaced], 400, tmp_path / "t.model", symbols)
    keys = vocabulary_keys(own, 400)
    texts = [
        "def f(x):\n    return x\n", "a  b", "\n\n", "x\n\n\n\n\n\ny", "\t\tx", " " * 30 + "the cat", "the" + " " * 8,
        "the cat\n        sat\n            on\n\n\n",
    ]  # fmt: skip
    assert [_bpe(text, keys) for text in texts] == [own.encode(text) for text in texts]


def test_the_way_back_from_a_file(case, tokenizer, keys, tmp_path: Path) -> None:
    """If this fails, a GGUF that is brought in and written again has lost its tokenizer, or cuts texts otherwise."""
    files = tokenizer_files({**keys, "tokenizer.chat_template": "{{ x }}"})
    for name, content in files.items():
        (tmp_path / name).write_bytes(content())
    again = Tokenizer.load(tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text() == "{{ x }}"
    assert vocabulary_keys(again, 384) == vocabulary_keys(tokenizer, 384)
    for text in (*TEXTS, "caf\u00e9 <mask>  hat\n\n", "\u2581x"):
        assert again.encode(text, bos=True, eos=True) == tokenizer.encode(text, bos=True, eos=True)
        assert again.decode(again.encode(text)) == text
    assert tokenizer_files({"tokenizer.ggml.model": "none"}) == {}


def test_vocabulary_keys(tokenizer, keys):
    """If this fails, special ids or kinds of pieces are wrong in the file."""
    at = {n.removeprefix("tokenizer.ggml."): v for n, v in keys.items() if "tokenizer" in n}
    assert at["model"] == "gemma4"
    assert at["tokens"] == [piece.text for piece in tokenizer.pieces()]
    assert set(at["scores"]) == {-1000.0}
    assert len(at["scores"]) == 384
    assert (at["padding_token_id"], at["eos_token_id"], at["bos_token_id"]) == (0, 1, 2)
    assert at["unknown_token_id"] == 3
    assert at["add_bos_token"] is True
    assert at["add_space_prefix"] is False
    kinds = at["token_type"]
    assert kinds[:6] == [3, 3, 3, 2, 3, 4]
    assert set(kinds[6:262]) == {gguf.TokenType.BYTE}
    assert set(kinds[262:]) == {gguf.TokenType.NORMAL}


class _Chat(SentencePieceTokenizer):
    """A tokenizer with one of the chat pieces."""

    def __init__(self, inner: Tokenizer) -> None:
        super().__init__(inner.model)

    def pieces(self) -> list[Piece]:
        """The pieces, the mask replaced by a tool call's start."""
        return [
            Piece(text.replace("<mask>", "<|tool_call>"), score, kind)
            for text, score, kind in super().pieces()
        ]


def test_chat_pieces_stay_visible(tokenizer):
    """If this fails, llama.cpp hides the pieces its chat parser looks for."""
    kinds = vocabulary_keys(_Chat(tokenizer), 384)["tokenizer.ggml.token_type"]
    assert isinstance(kinds, list)
    assert kinds[4] == gguf.TokenType.USER_DEFINED


def test_sizes_must_agree(case, tokenizer, tmp_path: Path):
    """If this fails, token ids and embedding rows drift apart without a word."""
    artifact = case.artifact(case.smallest(), tokenizer=tokenizer)
    with pytest.raises(InputError, match="384 pieces given, the model's vocabulary is 64"):
        export_gguf(artifact, tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == []


def test_the_chat_template_goes_along(tokenizer):
    """If this fails, llama.cpp falls back to a template of another model."""
    keys = vocabulary_keys(tokenizer, 384, "{{ messages }}")
    assert keys["tokenizer.chat_template"] == "{{ messages }}"
    assert "tokenizer.chat_template" not in vocabulary_keys(tokenizer, 384)
