"""The text that models are measured on: rows of one document each, and the categories the documents are of.

A corpus is a folder, a file or a TFDS dataset, of texts or of conversations (of which only what the model says is
scored). Its kind is told from its name. Categories are given names: those of several corpora, the first folders below
one, or what stands under a field of every record.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gemma_qat.data.encode import behind_bos, encoder
from gemma_qat.data.kinds import Kind, open_kind
from gemma_qat.data.packing import Rows, pack, targets
from gemma_qat.data.records import Format, Record
from gemma_qat.data.sources import text_source
from gemma_qat.data.token_bytes import token_bytes
from gemma_qat.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """Documents in one place, called `name` ("" leaves the name to the path).

    `kind` "" tells it from the path: `.jsonl`, `.parquet`, `.array_record`, a TFDS folder, else texts, all files of a
    folder. `format`, `field`, `split`: as training data has them. `category` is a field of every record.
    """

    path: str
    name: str = ""
    kind: Kind | str = ""
    format: Format = "text"
    field: str = ""
    split: str = "test"
    category: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Rows of one document each, to be resampled by document.

    Shapes: `category` int [documents], an index of `categories`, by the number a row's document has.
    `dropped` counts tokens of conversations that did not fit in a row.
    """

    rows: Rows
    format: Format
    categories: tuple[str, ...]
    category: np.ndarray
    dropped: int = 0

    @property
    def scored_documents(self) -> np.ndarray:
        """The numbers of the documents that have a token to score, ascending."""
        _, weights = targets(self.rows)
        return np.unique(self.rows.documents[weights > 0])


def held_out(
    corpora: Sequence[Corpus], tokenizer: Any, length: int, *, empty_thought: bool = False
) -> HeldOut:
    """Returns the rows of all documents of all corpora, each text cut into as many rows as it fills.

    Every row begins with `bos`, as llama.cpp has it: Gemma never saw the middle of a text without.
    A conversation is kept to its first `length` tokens: the rest would lack what was asked. A document without a byte
    to score, such as an empty file, is left out.
    Raises: FileNotFoundError for a missing path; InputError for fewer than two documents, for corpora of both formats,
        or as a source says.
    """
    formats = {corpus.format for corpus in corpora}
    if len(formats) > 1:
        raise InputError("texts and conversations are measured apart: give corpora of one format")
    _refuse_same(corpora)
    records: list[Record] = []
    labels: list[str] = []
    for corpus in corpora:
        found = list(open_corpus(corpus))
        records += found
        labels += _labels(corpus, found, several=len(corpora) > 1)
    (form,) = formats
    cut = None if form == "text" else length
    encoded = encoder(tokenizer, form, empty_thought)(records)
    if form == "text":
        encoded = [behind_bos(one, length) for one in encoded]

    def packed() -> Rows:
        return pack(
            [one.ids[:cut] for one in encoded], length, mix=False,
            learn=[one.learn[:cut] for one in encoded],
        )  # fmt: skip

    rows = packed()
    has_bytes = _scored_bytes(rows, len(encoded), token_bytes(tokenizer)) > 0
    if has_bytes.sum() < 2:
        raise InputError(
            f"{has_bytes.sum()} text given, at least 2 expected: intervals resample by document"
        )
    if not has_bytes.all():
        kept = np.flatnonzero(has_bytes)
        encoded, labels = [encoded[i] for i in kept], [labels[i] for i in kept]
        rows = packed()
    names = tuple(dict.fromkeys(labels))
    number = {name: index for index, name in enumerate(names)}
    inside = sum(min(len(one.ids), cut) if cut else len(one.ids) for one in encoded)
    return HeldOut(
        rows=rows, format=form, categories=names,
        category=np.asarray([number[label] for label in labels], np.int32),
        dropped=sum(len(one.ids) for one in encoded) - inside,
    )  # fmt: skip


def _scored_bytes(rows: Rows, documents: int, sizes: np.ndarray) -> np.ndarray:
    """Returns the bytes of the tokens of each document that are scored."""
    wanted, weights = targets(rows)
    scored = weights > 0
    return np.bincount(rows.documents[scored], weights=sizes[wanted[scored]], minlength=documents)


def first_rows(rows: Rows, per_document: int) -> Rows:
    """Returns at most `per_document` first rows of each document (all when 0); rows hold one document each."""
    if not per_document:
        return rows
    first = rows.documents[:, 0]
    rank = np.arange(len(first)) - np.searchsorted(first, first, side="left")
    return rows[np.flatnonzero(rank < per_document)]


def open_corpus(corpus: Corpus) -> Any:
    """Returns the source of a corpus.

    Raises: FileNotFoundError; InputError as the source says.
    """
    kind = corpus.kind or kind_of(Path(corpus.path))
    if kind == "text":
        if corpus.format == "chat":
            raise InputError(f"{corpus.path}: conversations expected, this is text")
        return text_source([Path(corpus.path)], pattern="**/*")
    settings: Any = dataclasses.replace(corpus, kind=kind)
    return open_kind(settings)


def kind_of(path: Path) -> Kind:
    """Returns the kind of source that a path looks like."""
    if path.is_dir():
        if any(path.rglob("dataset_info.json")):
            return "stdlib" if (path / "source").is_dir() else "tfds"
        files: Sequence[Path] = sorted(p for p in path.rglob("*") if p.is_file())[:1]
    else:
        files = [path]
    for file in files:
        for kind in ("jsonl", "parquet", "array_record"):
            if f".{kind}" in file.name:
                return kind  # type: ignore[return-value]
    return "text"


def _refuse_same(corpora: Sequence[Corpus]) -> None:
    named = [(corpus, corpus.name or Path(corpus.path).name) for corpus in corpora]
    names = [name for corpus, name in named if not corpus.category]
    for corpus, name in named:
        if names.count(name) > 1:
            raise InputError(
                f"{corpus.path}: two corpora are called {name}; give each a name, NAME=PATH"
            )


def _labels(corpus: Corpus, records: Sequence[Record], *, several: bool) -> list[str]:
    """Returns the category of every record of a corpus."""
    if corpus.category:
        beside = dataclasses.replace(corpus, field=corpus.category, format="text", category="")
        return [record["text"] for record in open_corpus(beside)]
    root = Path(corpus.path)
    whole = corpus.name or root.name
    if several or corpus.name or not root.is_dir():
        return [whole] * len(records)
    return [_first_folder(root, record["path"]) or whole for record in records]


def _first_folder(root: Path, path: str) -> str:
    """Returns the name of the folder right below `root` that a file is in; "" for one that is in none."""
    file = Path(path)
    if not file.is_relative_to(root):
        return ""
    parts = file.relative_to(root).parts
    return parts[0] if len(parts) > 1 else ""
