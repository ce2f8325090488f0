"""The kinds of source a config can name, each with the files it is made of and how it is opened.

| kind | path | a document is | under the field |
|---|---|---|---|
| text | a folder of `.txt`, or a file | a file | |
| jsonl | a folder of `.jsonl`, or a file | a line | text, messages, ids |
| parquet | a folder of `.parquet`, or a file | a row | text, messages, ids |
| array_record | a folder of `.array_record*`, or a file | a record | none (utf-8), messages, ids (JSON) |
| tfds | a TFDS dataset in ArrayRecord format | an example of `split` | text, messages, ids |
| stdlib | where the standard library is written, as tfds | a `.py` file | text |

The fields are those of texts, conversations and token ids where a config names none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from gemma_qat.data.datasets import tfds_source
from gemma_qat.data.records import Format, Source, default_field
from gemma_qat.data.sources import array_record_source, jsonl_source, parquet_source, text_source
from gemma_qat.errors import InputError

Kind = Literal["stdlib", "text", "jsonl", "parquet", "array_record", "tfds"]


@runtime_checkable
class SourceSettings(Protocol):
    """What `config.SourceConfig` offers."""

    @property
    def kind(self) -> Kind: ...  # noqa: D102
    @property
    def path(self) -> str: ...  # noqa: D102
    @property
    def format(self) -> Format: ...  # noqa: D102
    @property
    def field(self) -> str: ...  # noqa: D102
    @property
    def split(self) -> str: ...  # noqa: D102


@dataclass(frozen=True)
class _Files:
    """`pattern` finds the files of a kind, `open` makes a source of (path, field, format, split)."""

    pattern: str
    open: Callable[[Path, str, Format, str], Source]
    bare: bool = False  # a document may be a whole element, without a field
    splits: bool = False  # documents are in named parts: train, validation, test


KINDS: dict[str, _Files] = {
    "text": _Files("**/*.txt", lambda path, *_: text_source(path), bare=True),
    "jsonl": _Files("**/*.jsonl", lambda path, field, form, _: jsonl_source(path, field, form)),
    "parquet": _Files(
        "**/*.parquet", lambda path, field, form, _: parquet_source(path, field, form)
    ),
    "array_record": _Files(
        "**/*.array_record*",
        lambda path, field, form, _: array_record_source(path, field, form),
        bare=True,
    ),
    "tfds": _Files("**/*", tfds_source, splits=True),
}
KINDS["stdlib"] = KINDS["tfds"]


def open_kind(settings: SourceSettings) -> Source:
    """Returns the source that a config describes.

    Raises: FileNotFoundError for a path that is missing or holds nothing of the kind; InputError as
        the source says, or for conversations in a kind that holds text only.
    """
    field = settings.field
    if settings.format != "text" and settings.kind in ("text", "stdlib"):
        needed = "conversations" if settings.format == "chat" else "token ids"
        raise InputError(
            f"data.format={settings.format} needs {needed}, data.kind={settings.kind} is text"
        )
    if not field and not (KINDS[settings.kind].bare and settings.format == "text"):
        field = default_field(settings.format)
    opened = KINDS[settings.kind].open
    return opened(source_path(settings), field, settings.format, settings.split)


def fingerprint(settings: SourceSettings) -> str:
    """Returns a digest of what a source depends on: its settings, and its files by name, size and time.

    Contents are not read: a corpus may be terabytes. A file that is written again has another time.
    """
    path = source_path(settings)
    files = [path] if path.is_file() else sorted(path.glob(KINDS[settings.kind].pattern))
    about = [
        (file.relative_to(path).as_posix(), file.stat().st_size, file.stat().st_mtime_ns)
        for file in files
        if file.is_file()
    ]
    said = [settings.kind, settings.format, settings.field, settings.split, about]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def source_path(settings: SourceSettings) -> Path:
    """Returns where a source's files are: its path, or what `prepare` wrote below it."""
    return Path(settings.path, "source") if settings.kind == "stdlib" else Path(settings.path)
