"""What a data config would find, without making its rows: sources opened, a few documents read, pieces counted."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gemma_qat.data.blend import Blend
from gemma_qat.data.encode import encoder
from gemma_qat.data.files import (
    DataSettings,
    kept_rows,
    needs_tokenizer,
    refuse_pieces,
    tokenizer_path,
)
from gemma_qat.data.kinds import SourceSettings, open_kind, source_path
from gemma_qat.data.tokenizer import Tokenizer
from gemma_qat.errors import InputError, beside

READ = 8
"""Documents of a source that are read, evenly over it."""

ROW_BYTES = 3.0
"""Bytes that a token of a row takes on disk, at most: rows are compressed (`store.py`)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Looked:
    """One source: how many documents, and how many tokens one has in the mean of those read.

    `written` False: the standard library, which training writes there first.
    """

    kind: str
    path: str
    documents: int = 0
    tokens: float = 0.0
    written: bool = True

    @property
    def row_bytes(self) -> float:
        """Bytes of its rows on disk, about."""
        return self.documents * self.tokens * ROW_BYTES


def tokenizer_of(data: DataSettings, vocab_size: int) -> Tokenizer | None:
    """Returns the tokenizer of a data config; None where none is needed, or it is trained first.

    Raises: FileNotFoundError; InputError when none is named, it is none, or its pieces are not `vocab_size`.
    """
    if not data.tokenizer and not needs_tokenizer(data):
        return None
    path = tokenizer_path(data)
    if data.kind == "stdlib" and not data.tokenizer:
        refuse_pieces(data.vocab_size, vocab_size)
        if not path.is_file():
            return None
    tokenizer = Tokenizer.load(path)
    refuse_pieces(tokenizer.vocab_size, vocab_size)
    return tokenizer


def look_at(source: SourceSettings, data: DataSettings, tokenizer: Tokenizer | None) -> Looked:
    """Returns what a source of a data config holds; without a tokenizer documents are read and not counted.

    Raises: FileNotFoundError; InputError for a source without documents, of another kind, or a document that cannot be
        read or is of another format.
    """
    if source.kind == "stdlib" and not source_path(source).exists():
        return Looked(kind=source.kind, path=source.path, written=False)
    _refuse_missing(source_path(source))
    opened = open_kind(source)
    if not len(opened):
        raise InputError(f"{source.path}: no documents of kind {source.kind} in it")
    numbers = np.unique(np.linspace(0, len(opened) - 1, READ).astype(int))
    records = [opened[int(number)] for number in numbers]
    tokens = 0.0
    if tokenizer is not None or source.format == "ids":
        encoded = encoder(tokenizer, source.format, data.empty_thought)(records)
        tokens = float(np.mean([len(one.ids) for one in encoded]))
    return Looked(kind=source.kind, path=source.path, documents=len(opened), tokens=tokens)


def _refuse_missing(path: Path) -> None:
    """Names what is called like it, where only a name was mistyped; what is wrong otherwise, opening it says."""
    close = "" if path.exists() else beside(path)
    if close:
        raise FileNotFoundError(f"{path}: no such file or folder{close}")


def sources_of(data: DataSettings) -> Iterator[SourceSettings]:
    """Yields the first source and those blended in."""
    yield data
    yield from data.blend


def rows_of(data: DataSettings, cache: Path, tokenizer: Tokenizer | None) -> Blend | None:
    """Returns rows that were made before, None where they are still to be made."""
    return None if tokenizer is None else kept_rows(data, cache, tokenizer)
