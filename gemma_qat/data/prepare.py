"""The whole path for the standard library in one call: what quickstart and the tests train on.

    corpus -> DIRECTORY/source (TFDS, ArrayRecord) -> DIRECTORY/tokenizer.model -> rows per split

The tokenizer sees the train split only. The text it is trained on and, when asked for, the part of
the train split that is kept are chosen by a hash of the path: evenly over the library, the same on
every call.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gemma_qat.data.datasets import open_source, write_source
from gemma_qat.data.packing import Progress, Rows, pack, tokenize
from gemma_qat.data.records import Record, Source
from gemma_qat.data.sentencepiece_model import train_tokenizer
from gemma_qat.data.stdlib_corpus import SPLITS, by_split, collect, path_order
from gemma_qat.data.tokenizer import Tokenizer
from gemma_qat.errors import InputError

STDLIB_TOKENIZER = "tokenizer.model"
"""The file of the trained tokenizer, in the directory of the dataset."""

# Bytes of text that the tokenizer is trained on: more changes few of a small vocabulary's merges.
_TOKENIZER_BYTES = 4_000_000


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A corpus ready to train and evaluate on; the dicts have the keys train, validation and test.

    `documents` are the paths and `bytes` the utf-8 sizes, in the order that `Rows.documents`
    counts. Train rows mix documents; validation and test rows hold one document each.
    """

    tokenizer: Tokenizer
    rows: dict[str, Rows]
    documents: dict[str, list[str]]
    bytes: dict[str, list[int]]


def prepare_stdlib(
    directory: Path,
    *,
    vocab_size: int = 1024,
    length: int = 128,
    max_train_bytes: int | None = None,
    progress: Progress | None = None,
) -> Prepared:
    """Returns the standard library as packed rows, writing dataset and tokenizer under `directory`.

    `max_train_bytes` keeps a part of the train split of at most that size; the other splits stay
    whole. `progress(description, done, total)` is called as the work goes on.

    Raises: ValueError if `max_train_bytes` keeps no document.
    Exactness: two calls on one Python installation give identical arrays.
    """
    say = progress or (lambda description, done, total: None)
    write_stdlib(directory, say)
    records = {split: list(open_source(directory / "source", split)) for split in SPLITS}
    if max_train_bytes is not None:
        records["train"] = _part(records["train"], max_train_bytes)
    tokenizer = _trained(records["train"], vocab_size, directory, say)
    rows = {split: _rows(split, records[split], tokenizer, length, say) for split in SPLITS}
    return Prepared(
        tokenizer=tokenizer,
        rows=rows,
        documents={split: [record["path"] for record in records[split]] for split in SPLITS},
        bytes={split: [_size(record) for record in records[split]] for split in SPLITS},
    )


def write_stdlib(directory: Path, progress: Progress) -> None:
    """Writes the standard library as the TFDS dataset `directory`/source, unless it is there."""
    progress("collect", 0, 1)
    write_source(by_split(collect()), directory / "source")
    progress("collect", 1, 1)


def stdlib_tokenizer(directory: Path, vocab_size: int, progress: Progress) -> Tokenizer:
    """Returns the tokenizer of the dataset that `write_stdlib` wrote, trained on its train split."""
    records = list(open_source(directory / "source", "train"))
    return _trained(records, vocab_size, directory, progress)


def _trained(
    records: list[Record], vocab_size: int, directory: Path, progress: Progress
) -> Tokenizer:
    progress("train tokenizer", 0, 1)
    texts = [record["text"] for record in _part(records, _TOKENIZER_BYTES)]
    tokenizer = train_tokenizer(texts, vocab_size, directory / STDLIB_TOKENIZER)
    progress("train tokenizer", 1, 1)
    return tokenizer


def _rows(
    split: str, records: list[Record], tokenizer: Tokenizer, length: int, say: Progress
) -> Rows:
    def say_split(description: str, done: int, total: int) -> None:
        say(f"{description} {split}", done, total)

    source = Source(items=records, read=dict)
    return pack(tokenize(source, tokenizer, say_split), length, mix=split == "train")


def _part(records: list[Record], limit: int) -> list[Record]:
    """Records that fit in `limit` bytes, chosen in the order of their paths' hashes; order kept."""
    kept, total = set(), 0
    for index in sorted(range(len(records)), key=lambda index: path_order(records[index]["path"])):
        if total + (size := _size(records[index])) <= limit:
            kept.add(index)
            total += size
    if not kept:
        raise InputError(f"prepare: {limit} bytes hold none of the {len(records)} train documents")
    return [record for index, record in enumerate(records) if index in kept]


def _size(record: Record) -> int:
    return len(record["text"].encode("utf-8"))
