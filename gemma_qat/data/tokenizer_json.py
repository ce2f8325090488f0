"""Hugging Face's `tokenizer.json`, run by the library it was made for.

The file holds the vocabulary, the merges and the added tokens; which of them starts, ends or pads stands in the
`tokenizer_config.json` beside it, and where there is none, Gemma's names for them count. What the file says of padding,
truncation and added ends is for whole prompts and is left out: ids here are of the text alone.

Source: huggingface/tokenizers, `tokenizers/src/tokenizer/serialization.rs` and `added_vocabulary.rs`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gemma_qat.data.tokenizer import Kind, Piece, Tokenizer
from gemma_qat.errors import InputError

CONFIG = "tokenizer_config.json"

# The key of tokenizer_config.json, and the pieces that are it where the file is missing: Gemma's, Llama's.
_ENDS = {
    "bos": ("bos_token", ("<bos>", "<s>")),
    "eos": ("eos_token", ("<eos>", "</s>")),
    "pad": ("pad_token", ("<pad>",)),
    "unk": ("unk_token", ("<unk>",)),
}


def json_tokenizer(file: Path, content: bytes) -> JsonTokenizer:
    """Returns the tokenizer of a `tokenizer.json` with these bytes, its ends as the file beside it says.

    Raises: InputError for what the library does not take, or when a piece that it needs is missing.
    """
    beside = file.with_name(CONFIG)
    try:
        said = json.loads(beside.read_text("utf-8")) if beside.is_file() else {}
    except ValueError as error:
        raise InputError(f"{beside}: not JSON ({error})") from None
    if not isinstance(said, Mapping):
        raise InputError(f"{beside}: expected an object")
    names = {end: _content(said.get(key)) for end, (key, _) in _ENDS.items()}
    try:
        return JsonTokenizer(content, names)
    except InputError as error:
        raise InputError(f"tokenizer {file}: {error}") from None


class JsonTokenizer(Tokenizer):
    """A tokenizer of Hugging Face's `tokenizers`."""

    def __init__(self, model: bytes, names: Mapping[str, str | None] = {}) -> None:
        """Wraps the bytes of a `tokenizer.json`; `names` are pieces by what they mark: bos, eos, pad, unk.

        Raises: InputError for what the library does not take, ids with holes, or no piece that starts or ends a text.
        """
        import tokenizers

        self.model = model
        try:
            text = model.decode("utf-8-sig")
            self._said: dict[str, Any] = json.loads(text)
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises nothing narrower
            raise InputError(f"expected a tokenizer.json ({error})") from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True  # the text of a control piece is text
        self._ids: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        if sorted(self._ids.values()) != list(range(len(self._ids))):
            raise InputError(
                f"ids of its {len(self._ids)} pieces are not 0 to {len(self._ids) - 1}"
            )
        ends = {end: self._end(end, names.get(end)) for end in _ENDS}
        missing = next((end for end in ("bos", "eos") if ends[end] < 0), None)
        if missing is not None:
            key, usual = _ENDS[missing]
            raise InputError(f"no {key} in {CONFIG} and no piece {' or '.join(usual)}")
        super().__init__(vocab_size=len(self._ids), **ends)

    def _end(self, end: str, given: str | None) -> int:
        key, usual = _ENDS[end]
        if given is not None and given not in self._ids:
            raise InputError(f"{key} {given} of {CONFIG} is not among its {len(self._ids)} pieces")
        names = usual if given is None else (given,)
        return next((self._ids[name] for name in names if name in self._ids), -1)

    def _encode_parts(self, texts: Sequence[str]) -> list[np.ndarray]:
        found = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, np.int32) for encoding in found]

    def _find(self, piece: str) -> int | None:
        return self._ids.get(piece)

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`; control ids (padding, bos, eos) give none.

        Raises: IndexError for an id outside the vocabulary.
        """
        wanted = [int(i) for i in ids]
        wrong = next((i for i in wanted if not 0 <= i < len(self._ids)), None)
        if wrong is not None:
            raise IndexError(f"piece id is out of range: {wrong}")
        return self._tokenizer.decode(wanted, skip_special_tokens=True)

    def pieces(self) -> list[Piece]:
        """Returns (text, score, kind) of every id in order.

        The file has no scores: that of a merged piece is minus the place of its first merge, others come after.
        """
        merges = self.merges()
        first = {left + right: -i for i, (left, right) in reversed(list(enumerate(merges)))}
        added = {token["content"]: token for token in self._said.get("added_tokens", ())}
        byte = self._said["model"].get("byte_fallback", False)
        in_order = sorted(self._ids, key=self._ids.__getitem__)
        return [
            Piece(
                text,
                float(first.get(text, -len(merges) - i)),
                self._kind(i, added.get(text), byte and _is_byte(text)),
            )
            for i, text in enumerate(in_order)
        ]

    def _kind(self, i: int, added: Mapping[str, Any] | None, byte: bool) -> Kind:
        if i == self.unk_id:
            return "unknown"
        if byte:
            return "byte"
        if added is None:
            return "normal"
        return "control" if added.get("special") else "user_defined"

    def merges(self) -> list[tuple[str, str]]:
        """Returns the pairs of pieces that join, the first one first; none unless it is byte-pair encoding."""
        found = self._said["model"].get("merges", ())
        # Written as pairs since version 0.20 of the library, as "left right" before.
        pairs = (tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in found)
        return [(left, right) for left, right in pairs]


def _content(token: Any) -> str | None:
    """A token as tokenizer_config.json writes it: its text, or an object that has it."""
    return token.get("content") if isinstance(token, Mapping) else token


def _is_byte(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")
