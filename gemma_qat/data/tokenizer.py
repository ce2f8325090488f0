"""Text to token ids and back, whichever library made the tokenizer: SentencePiece or Hugging Face's `tokenizers`.

Both give the same ids for the same vocabulary. Two things are made alike here. Spaces are stored as U+2581, so a
literal U+2581 in a text would come back as a space: it is written as its three utf-8 bytes instead. And the text of a
control piece (`<bos>`) is text, whoever wrote it: control ids come from `bos_id` and its like, never out of a document.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from gemma_qat.errors import InputError, beside, refuse_address

Kind = Literal["normal", "unknown", "control", "user_defined", "byte"]

SPACE_MARK = "\u2581"
"""What a space is within a piece."""

JSON_NAME = "tokenizer.json"
"""What Hugging Face calls its file; a SentencePiece model is called `tokenizer.model`, or like it."""


class Piece(NamedTuple):
    """One vocabulary entry, as an export writer needs it."""

    text: str
    score: float
    kind: Kind


class Tokenizer(abc.ABC):
    """Ids of text, text of ids.

    `model` is its file's bytes, `vocab_size` the number of ids. `bos_id` starts a document and `eos_id` ends it,
    `pad_id` is padding and `unk_id` the unknown piece, which byte fallback leaves unused; -1 where there is none.
    """

    model: bytes

    def __init__(self, *, vocab_size: int, bos: int, eos: int, pad: int, unk: int) -> None:
        """Called by a subclass when its own vocabulary is ready."""
        self.vocab_size = vocab_size
        self.bos_id, self.eos_id, self.pad_id, self.unk_id = bos, eos, pad, unk
        ids = [self._find(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode("utf-8")]
        self._mark_ids = None if None in ids else np.asarray(ids, np.int32)

    @staticmethod
    def load(path: Path) -> Tokenizer:
        """Returns the tokenizer in a file, told by its contents, or in a directory that holds one.

        Raises: FileNotFoundError for a missing file; InputError for one that is neither a SentencePiece model nor a
            `tokenizer.json`.
        """
        file = _file_of(path)
        content = file.read_bytes()
        if _is_json(content):
            from gemma_qat.data.tokenizer_json import json_tokenizer

            return json_tokenizer(file, content)
        from gemma_qat.data.sentencepiece_model import SentencePieceTokenizer

        try:
            return SentencePieceTokenizer(content)
        except RuntimeError:  # what SentencePiece raises; its text names its own source files
            raise InputError(
                f"tokenizer {file}: expected a SentencePiece model or a tokenizer.json"
            ) from None

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Returns the ids of `text`, after `bos_id` and before `eos_id` where asked for."""
        (ids,) = self.encode_all([text])
        return [self.bos_id] * bos + ids.tolist() + [self.eos_id] * eos

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the ids of each text, int32 [N], found on all cores at once.

        Exactness: equal to encoding them one by one.
        """
        mark = self._mark_ids
        split = [[text] if mark is None else text.split(SPACE_MARK) for text in texts]
        encoded = iter(self._encode_parts([part for parts in split for part in parts]))
        between = np.zeros(0, np.int32) if mark is None else mark
        found = []
        for parts in split:
            pieces = [next(encoded)]
            for _ in parts[1:]:
                pieces += [between, next(encoded)]
            found.append(np.concatenate(pieces))
        return found

    def id_of(self, piece: str) -> int:
        """Returns the id of a piece, such as `<|turn>`.

        Raises: InputError if the vocabulary has no such piece.
        """
        found = self._find(piece)
        if found is None:
            raise InputError(f"tokenizer: no piece {piece} among its {self.vocab_size}")
        return found

    @abc.abstractmethod
    def _encode_parts(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the ids of texts without U+2581, int32 [N] each."""

    @abc.abstractmethod
    def _find(self, piece: str) -> int | None:
        """Returns the id of a piece, None if there is none."""

    @abc.abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`; control ids (padding, bos, eos) give none.

        Raises: IndexError for an id outside the vocabulary.
        """

    @abc.abstractmethod
    def pieces(self) -> list[Piece]:
        """Returns (text, score, kind) of every id in order; of two normal pieces the earlier merge scores higher."""

    @abc.abstractmethod
    def merges(self) -> list[tuple[str, str]]:
        """Returns the pairs of pieces that join, the first one first; none unless it is byte-pair encoding."""


def tokenizer_among(files: Iterable[Path]) -> Path | None:
    """Returns the tokenizer among a model's small files, None when there is none."""
    named = {file.name: file for file in files if file.is_file()}
    models = [
        name for name in sorted(named) if name.startswith("tokenizer") and name.endswith(".model")
    ]
    return next((named[name] for name in (JSON_NAME, *models) if name in named), None)


def tokenizer_files(path: Path) -> dict[str, bytes]:
    """Returns a tokenizer's files as hubs name them: its own, and the config that lies beside a tokenizer.json."""
    from gemma_qat.data.tokenizer_json import CONFIG

    file = _file_of(path)
    content = file.read_bytes()
    if not _is_json(content):
        return {"tokenizer.model": content}
    config = file.with_name(CONFIG)
    return {JSON_NAME: content} | ({CONFIG: config.read_bytes()} if config.is_file() else {})


def _is_json(content: bytes) -> bool:
    return content[:1] in (b"{", b"\xef")  # perhaps after a byte order mark


def _file_of(path: Path) -> Path:
    refuse_address(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"tokenizer {path}: no such file{beside(path)}")
    file = tokenizer_among(path.iterdir())
    if file is None:
        raise FileNotFoundError(f"tokenizer {path}: no {JSON_NAME} and no tokenizer.model in it")
    return file
