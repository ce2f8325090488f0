"""A vocabulary as llama.cpp wants it: pieces, kinds and merges.

llama.cpp reads Gemma 4's vocabulary as byte-pair merges over unicode characters ("gemma4"), not by
piece scores.

Source: `Gemma4Model.set_vocab` in ggml-org/llama.cpp (conversion/gemma.py) and `llama-vocab.cpp`
for what is read.
"""

from __future__ import annotations

from gemma_qat.errors import InputError
from gemma_qat.export.artifact import Vocabulary

KeyValues = dict[str, str | bool | int | float | list]

MODEL = "gemma4"
TEMPLATE = "tokenizer.chat_template"

# `llama_token_type`.
KINDS = {"normal": 1, "unknown": 2, "control": 3, "user_defined": 4, "byte": 6}

# Control pieces that must be rendered all the same, for the chat parser to see them.
VISIBLE = frozenset(
    {
        "<|channel>",
        "<channel|>",
        "<|tool_call>",
        "<tool_call|>",
        "<|tool_response>",
        "<tool_response|>",
        '<|"|>',
    }
)

_SCORE = -1000.0
"""Scores are present for the format's sake; with merges nobody reads them."""


def vocabulary_keys(
    tokenizer: Vocabulary | None, vocab_size: int, chat_template: str | None = None
) -> KeyValues:
    """Returns the key/values of a vocabulary; without one, those of a file that only takes ids.

    Raises: InputError when its size is not the model's, or when it has no merges (it is not BPE).
    """
    if tokenizer is None:
        return {"tokenizer.ggml.model": "none"}
    pieces = list(tokenizer.pieces())
    if len(pieces) != vocab_size:
        raise InputError(
            f"tokenizer: {len(pieces)} pieces given, the model's vocabulary is {vocab_size}"
        )
    joined = tokenizer.merges()
    if not joined:
        raise InputError("tokenizer: no merges; a BPE vocabulary expected")
    ids = {
        "bos": tokenizer.bos_id,
        "eos": tokenizer.eos_id,
        "padding": tokenizer.pad_id,
        "unknown": tokenizer.unk_id,
    }
    return {
        "tokenizer.ggml.model": MODEL,
        "tokenizer.ggml.tokens": [text for text, _, _ in pieces],
        "tokenizer.ggml.scores": [_SCORE] * len(pieces),
        "tokenizer.ggml.token_type": [_kind(text, kind) for text, _, kind in pieces],
        "tokenizer.ggml.merges": [f"{left} {right}" for left, right in joined],
        **{f"tokenizer.ggml.{name}_token_id": i for name, i in ids.items() if i >= 0},
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": False,
        **({TEMPLATE: chat_template} if chat_template else {}),
    }


def _kind(text: str, kind: str) -> int:
    return KINDS["user_defined" if text in VISIBLE else kind]
