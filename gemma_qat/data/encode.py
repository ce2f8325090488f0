"""Records -> token ids, and which of them are to be learned."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from gemma_qat.data.chat import Span, chat_spans
from gemma_qat.data.records import Format, Record
from gemma_qat.data.tokenizer import Tokenizer
from gemma_qat.errors import InputError


class Encoded(NamedTuple):
    """One document: its ids [N] int32, and 1 for each that is to be learned, else 0, [N] int32."""

    ids: np.ndarray
    learn: np.ndarray


Encoder = Callable[[Sequence[Record]], list[Encoded]]
"""Records -> what a model reads of each."""


def text_spans(record: Record, tokenizer: Tokenizer) -> list[Span]:
    """Returns a document between bos and eos, all of it to be learned."""
    return [([tokenizer.bos_id], True), (record["text"], True), ([tokenizer.eos_id], True)]


def encoder(
    tokenizer: Tokenizer | None,
    content: Format,
    empty_thought: bool = False,
    vocab_size: int | None = None,
) -> Encoder:
    """Returns the encoder of documents of one format; token ids need no tokenizer, only how many there are."""
    if content == "ids":
        return functools.partial(_as_they_are, tokenizer.vocab_size if tokenizer else vocab_size)
    assert tokenizer is not None
    formats: dict[str, Callable[[Record, Tokenizer], list[Span]]] = {
        "text": text_spans,
        "chat": functools.partial(chat_spans, empty_thought=empty_thought),
    }
    return functools.partial(_encode, formats[content], tokenizer)


def behind_bos(text: Encoded, length: int) -> Encoded:
    """Returns a text with its first token, `bos`, again before every `length` - 1 tokens behind the first `length`.

    So each of the pieces of `length` tokens that it is cut into begins with `bos`. Those put in are not to be learned.
    """
    again = np.arange(length, len(text.ids), length - 1)
    return Encoded(np.insert(text.ids, again, text.ids[:1]), np.insert(text.learn, again, 0))


def _as_they_are(vocab_size: int | None, records: Sequence[Record]) -> list[Encoded]:
    """Returns documents of token ids, all of each to be learned.

    Raises: InputError naming the document for one without ids, or with something that is none.
    """
    found = []
    for record in records:
        ids, where = record["ids"], record["path"]
        if not ids:
            raise InputError(f"{where}: no token ids in it")
        wrong = [
            one
            for one in ids
            if type(one) is not int or not 0 <= one < (vocab_size or np.iinfo(np.int32).max)
        ]
        if wrong:
            most = f" below {vocab_size}" if vocab_size else ""
            raise InputError(f"{where}: token ids{most} expected, {wrong[0]!r} is none")
        kept = np.asarray(ids, np.int32)
        found.append(Encoded(kept, np.ones_like(kept)))
    return found


def _encode(
    spans_of: Callable[[Record, Tokenizer], list[Span]],
    tokenizer: Tokenizer,
    records: Sequence[Record],
) -> list[Encoded]:
    """All texts of all records go to the tokenizer together: it works on them on all cores."""
    documents = [spans_of(record, tokenizer) for record in records]
    texts = [what for spans in documents for what, _ in spans if isinstance(what, str)]
    encoded = iter(tokenizer.encode_all(texts))
    found = []
    for spans in documents:
        ids = [next(encoded) if isinstance(w, str) else np.asarray(w, np.int32) for w, _ in spans]
        learn = [np.full(len(part), one[1], np.int32) for part, one in zip(ids, spans, strict=True)]
        found.append(Encoded(np.concatenate(ids), np.concatenate(learn)))
    return found
