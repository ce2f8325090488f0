"""A tokenizer.json against the SentencePiece model it was made from: the same ids, texts, kinds and merges."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hard_texts import HARD

from gemma_qat.data import Tokenizer, chat_spans, encoder, train_tokenizer
from gemma_qat.data.token_bytes import token_bytes as bytes_of_tokens
from gemma_qat.errors import InputError

TEXTS = (
    "def add(left, right):\n    return left + right\n",
    "import os\n\n\nfor name in os.listdir('.'):\n    if len(name) > 3:\n        print(name)\n",
    "the cat sat on the mat, and the other cat sat on that\n",
)
MARKS = ("<|turn>", "<turn|>", "<|channel>", "<channel|>")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A SentencePiece model with the turn marks."""
    return train_tokenizer(TEXTS, 340, tmp_path_factory.mktemp("model") / "t.model", MARKS)


def contents(model: Tokenizer) -> dict[str, Any]:
    """A tokenizer.json as the public converter makes one of a SentencePiece model with byte fallback."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    pieces = model.pieces()
    vocabulary = {piece.text: i for i, piece in enumerate(pieces)}
    made = tokenizers.Tokenizer(
        models.BPE(vocabulary, model.merges(), unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    made.normalizer = normalizers.Replace(" ", "\u2581")
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    for piece in pieces:
        if piece.kind in ("control", "unknown"):
            made.add_special_tokens(
                [tokenizers.AddedToken(piece.text, normalized=False, special=True)]
            )
        if piece.kind == "user_defined":
            made.add_tokens([tokenizers.AddedToken(piece.text, normalized=False)])
    return json.loads(made.to_str())


def written(folder: Path, said: dict[str, Any], config: dict[str, Any] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(said), "utf-8")
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return folder


@pytest.fixture(scope="module")
def twin(model: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The same vocabulary, read from a directory with a tokenizer.json."""
    return Tokenizer.load(written(tmp_path_factory.mktemp("json"), contents(model)))


@pytest.mark.parametrize("text", HARD)
def test_both_give_the_same_ids_and_text(model: Tokenizer, twin: Tokenizer, text: str) -> None:
    """Broken: a run on a hub's directory would see other tokens than the one on the SentencePiece model."""
    assert twin.encode(text) == model.encode(text)
    assert twin.decode(twin.encode(text)) == text == model.decode(model.encode(text))
    assert twin.encode(text, bos=True, eos=True) == model.encode(text, bos=True, eos=True)


def test_any_unicode_is_the_same(model: Tokenizer, twin: Tokenizer) -> None:
    """Broken: some character would be cut or lost by one of the two."""
    codes = np.random.default_rng(0).integers(0, 0x110000, 3000)
    text = "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)
    assert twin.encode(text) == model.encode(text)
    assert twin.decode(twin.encode(text)) == text


def test_together_equals_one_by_one(model: Tokenizer, twin: Tokenizer) -> None:
    """Broken: rows would depend on what else was tokenized with them."""
    for tokenizer in (model, twin):
        found = tokenizer.encode_all(HARD)
        assert [ids.tolist() for ids in found] == [tokenizer.encode(text) for text in HARD]
        assert all(ids.dtype == np.int32 for ids in found)


def test_ids_kinds_merges_and_bytes_are_the_same(model: Tokenizer, twin: Tokenizer) -> None:
    """Broken: an export would hold other pieces, kinds or merges; bits per byte would differ."""
    assert (twin.bos_id, twin.eos_id, twin.pad_id, twin.unk_id) == (2, 1, 0, 3)
    assert twin.vocab_size == model.vocab_size == 340
    assert [(p.text, p.kind) for p in twin.pieces()] == [(p.text, p.kind) for p in model.pieces()]
    assert twin.merges() == model.merges() and len(model.merges()) > 40
    np.testing.assert_array_equal(bytes_of_tokens(twin), bytes_of_tokens(model))
    for other in (model, twin):
        scores = {piece.text: piece.score for piece in other.pieces() if piece.kind == "normal"}
        joined = dict.fromkeys(left + right for left, right in other.merges())
        first = [text for text in joined if text in scores]
        assert [scores[text] for text in first] == sorted((scores[t] for t in first), reverse=True)


def test_merges_as_text_and_as_pairs(model: Tokenizer, twin: Tokenizer, tmp_path: Path) -> None:
    """Broken: files written before version 0.20 of the library would lose their merges."""
    said = contents(model)
    said["model"]["merges"] = [" ".join(pair) for pair in model.merges()]
    assert Tokenizer.load(written(tmp_path / "old", said)).merges() == twin.merges()


def test_conversations_are_the_same(model: Tokenizer, twin: Tokenizer) -> None:
    """Broken: turns would be marked otherwise, or a message could end one."""
    record = {
        "path": "r",
        "messages": [
            {"role": "user", "content": "the cat<turn|> sat"},
            {"role": "assistant", "content": "on the <s> mat"},
        ],
    }
    assert chat_spans(record, twin) == chat_spans(record, model)
    (mine,), (theirs,) = (list(encoder(t, "chat")([record])) for t in (model, twin))
    for a, b in zip(mine, theirs, strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(InputError, match="no piece <|nowhere> among its 340"):
        twin.id_of("<|nowhere>")


def test_what_a_prompt_would_add_is_left_out(
    model: Tokenizer, twin: Tokenizer, tmp_path: Path
) -> None:
    """Broken: a file that pads, cuts or adds bos for prompts would do so within training documents."""
    said = contents(model)
    said["padding"] = {
        "strategy": {"Fixed": 99}, "direction": "Left", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>",
    }  # fmt: skip
    said["truncation"] = {
        "direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0,
    }  # fmt: skip
    said["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [2], "tokens": ["<s>"]}},
    }  # fmt: skip
    other = Tokenizer.load(written(tmp_path / "prompts", said))
    assert other.encode(HARD[3]) == twin.encode(HARD[3])


def test_the_config_beside_it_names_the_ends(model: Tokenizer, tmp_path: Path) -> None:
    """Broken: documents of a vocabulary with other names would have no ends, or the wrong ones."""
    said, load = contents(model), functools.partial(written, tmp_path / "named")
    named = {"bos_token": "<mask>", "eos_token": {"content": "<turn|>"}, "pad_token": None}
    tokenizer = Tokenizer.load(load(said, named))
    ids = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    assert ids == (4, model.id_of("<turn|>"), 0)
    with pytest.raises(
        InputError, match=r"named/tokenizer.json: bos_token <start> of tokenizer_conf"
    ):
        Tokenizer.load(load(said, {"bos_token": "<start>"}))
    with pytest.raises(InputError, match=r"tokenizer_config.json: expected an object"):
        Tokenizer.load(load(said, ["<s>"]))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "expected a tokenizer.json"),
        (b"{}", "expected a tokenizer.json"),
        (b'{"model": {"type": "BPE"}}', "expected a tokenizer.json"),
        (
            b'{"version": "1.0", "model": {"type": "Other", "vocab": {}}}',
            "expected a tokenizer.json",
        ),
        (b"\xff\xfe{", "expected a SentencePiece model or a tokenizer.json"),
    ],
)
def test_another_file_is_one_line(content: bytes, said: str, tmp_path: Path) -> None:
    """Broken: a file of another kind would end in a traceback of the library's."""
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(InputError) as raised:
        Tokenizer.load(path)
    assert str(raised.value).startswith(f"tokenizer {path}: ") and said in str(raised.value)


def test_a_vocabulary_without_ends_or_with_holes_is_refused(
    model: Tokenizer, tmp_path: Path
) -> None:
    """Broken: documents would get id -1 at their ends, or an embedding row that no piece has."""
    text = json.dumps(contents(model))
    with pytest.raises(
        InputError, match="no bos_token in tokenizer_config.json and no piece <bos> or <s>"
    ):
        Tokenizer.load(written(tmp_path / "a", json.loads(text.replace('"<s>"', '"<start>"'))))
    said = json.loads(text)
    last = model.pieces()[-1].text
    said["model"]["vocab"][last] = 4000
    with pytest.raises(InputError, match="ids of its 340 pieces are not 0 to 339"):
        Tokenizer.load(written(tmp_path / "b", said))


def test_ids_outside_and_empty_directories(twin: Tokenizer, tmp_path: Path) -> None:
    """Broken: a wrong id would be dropped without a word; a folder without a tokenizer would say nothing useful."""
    with pytest.raises(IndexError, match="340"):
        twin.decode([340])
    with pytest.raises(FileNotFoundError, match=r"no tokenizer.json and no tokenizer.model in it$"):
        Tokenizer.load(tmp_path)


def test_a_unigram_model_has_no_merges(tmp_path: Path) -> None:
    """Broken: llama.cpp would be given merges of a vocabulary that never merged."""
    import io

    import sentencepiece

    from gemma_qat.data import SentencePieceTokenizer

    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 9), model_writer=made, vocab_size=60, minloglevel=2,
        model_type="unigram", hard_vocab_limit=False,
    )  # fmt: skip
    assert SentencePieceTokenizer(made.getvalue()).merges() == []
