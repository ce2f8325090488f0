"""Texts of benchmarks to ids and back. Conversations are in test_harness.py: templates need the extra `eval`."""

from __future__ import annotations

import pytest

from gemma_qat.data import SYMBOLS, Tokenizer, train_tokenizer
from gemma_qat.errors import InputError
from gemma_qat.evals.prompting import PromptText


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    out = tmp_path_factory.mktemp("t") / "tokenizer.model"
    return train_tokenizer(["a mark, and a text that is no mark"], 290, out, SYMBOLS)


def test_every_text_starts_with_bos_once(tokenizer: Tokenizer) -> None:
    """If it fails, Gemma is run without its first token, or with two of them."""
    text, bos = PromptText(tokenizer), tokenizer.bos_id
    plain = tokenizer.encode("a text")
    assert text.bos == "<s>"
    for given in ("a text", "<s>a text", "<s><s>a text"):
        assert text.encode(given) == [bos, *plain]
    assert text.encode("a text", bos=False) == plain
    assert text.encode("<s>a text", bos=False) == [bos, *plain]
    assert text.encode("a <s>") == [bos, *tokenizer.encode("a <s>")]  # text, further in
    assert text.decode([bos, *plain]) == "a text"


def test_an_answer_ends_with_its_text_or_turn(tokenizer: Tokenizer) -> None:
    """If it fails, an instruction-tuned model is decoded on into turns of its own making."""
    assert PromptText(tokenizer).stop_tokens == (tokenizer.eos_id, tokenizer.id_of("<turn|>"))


def test_what_it_needs_is_said(tokenizer: Tokenizer) -> None:
    """If it fails, a conversation is asked of a checkpoint without a template, as plain text."""
    with pytest.raises(InputError, match="no chat template travels with the checkpoint"):
        PromptText(tokenizer).render([{"role": "user", "content": "a"}], True)
