"""From a data config, or a list of files, to rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from gemma_qat.data.loader import Batch, make_loader
from gemma_qat.data.packing import Progress, Rows, pack, tokenize
from gemma_qat.data.prepare import prepare_stdlib
from gemma_qat.data.sources import jsonl_source, text_source
from gemma_qat.data.tokenizer import Tokenizer
from gemma_qat.errors import InputError


@runtime_checkable
class DataSettings(Protocol):
    """What `config.DataConfig` offers."""

    @property
    def kind(self) -> str: ...  # noqa: D102
    @property
    def path(self) -> str: ...  # noqa: D102
    @property
    def tokenizer(self) -> str: ...  # noqa: D102
    @property
    def vocab_size(self) -> int: ...  # noqa: D102
    @property
    def length(self) -> int: ...  # noqa: D102


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingRows:
    """Packed training rows and the size of the vocabulary they are in."""

    train: Rows
    vocab_size: int


def training_rows(data: DataSettings, progress: Progress | None = None) -> TrainingRows:
    """Returns the training rows a data config describes.

    Raises: FileNotFoundError for a missing path; InputError when a tokenizer is needed and none is named.
    """
    if data.kind == "stdlib":
        prepared = prepare_stdlib(
            Path(data.path), vocab_size=data.vocab_size, length=data.length, progress=progress
        )
        return TrainingRows(train=prepared.rows["train"], vocab_size=prepared.tokenizer.vocab_size)
    if not data.tokenizer:
        raise InputError(f"data.kind={data.kind} needs data.tokenizer, a SentencePiece model file")
    tokenizer = Tokenizer.load(Path(data.tokenizer))
    path = Path(data.path)
    source = text_source([path]) if data.kind == "text" else jsonl_source(path)
    rows = pack(tokenize(source, tokenizer, progress), data.length)
    return TrainingRows(train=rows, vocab_size=tokenizer.vocab_size)


def evaluation_rows(files: Sequence[str | Path], tokenizer: Any, length: int) -> Rows:
    """Returns rows of one document each, to be resampled by file.

    Raises: FileNotFoundError for a missing file; InputError for fewer than two documents.
    """
    source = text_source([Path(file) for file in files], pattern="**/*")
    if len(source) < 2:
        raise InputError(
            f"{len(source)} text file given, at least 2 expected: intervals resample by file"
        )
    return pack(tokenize(source, tokenizer), length, mix=False)


def calibration_batches(
    files: Sequence[str | Path], tokenizer: Any, *, length: int, batch_size: int
) -> Iterator[Batch]:
    """Returns shuffled batches of rows packed from text files, one pass over them.

    Raises: FileNotFoundError for a missing file; InputError when there is no text in them.
    """
    source = text_source([Path(file) for file in files], pattern="**/*")
    rows = pack(tokenize(source, tokenizer), length)
    if not len(rows):
        raise InputError(f"{files[0]}: no text to calibrate on")
    return make_loader(rows, batch_size=min(batch_size, len(rows)), seed=0, num_epochs=1)
