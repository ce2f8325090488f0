"""A person's own documents as random-access sources: text, JSON lines, Parquet, ArrayRecord files.

Nothing is loaded when a source is opened: it knows where each document lies, and reads one when
asked. So corpora larger than memory are a matter of disk, and a process may start anywhere in one.

Source: Grain's random-access data sources (github.com/google/grain), ArrayRecord
(github.com/google/array_record) and Apache Parquet through pyarrow.
"""

from __future__ import annotations

import array
import functools
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gemma_qat.data.records import Format, Joined, Numbered, Record, Source, take
from gemma_qat.errors import InputError, refuse_address, unknown


def text_source(paths: Path | Sequence[Path], pattern: str = "**/*.txt") -> Source:
    """Returns text files as records; a folder stands for its files that match `pattern`, sorted.

    Raises: FileNotFoundError for a missing path or a folder without a match; ValueError, on
        reading, for a file that is not utf-8.
    """
    files: list[Path] = []
    for path in [paths] if isinstance(paths, Path) else paths:
        files += files_of(path, pattern, "text")
    return Source(items=tuple(files), read=_read_text)


def jsonl_source(path: Path, field: str = "text", content: Format = "text") -> Source:
    """Returns the lines of a JSON-lines file, or of a folder's, as records; their path is `FILE:LINE`.

    Only line numbers and offsets are held in memory, 16 bytes a line. Blank lines are skipped.

    Raises: FileNotFoundError for a missing file; ValueError, on reading, for a line that is not an
        object with such content under `field`, naming file and line.
    """
    files = files_of(path, "**/*.jsonl", "JSON-lines")
    lines = Joined([_Lines(file) for file in files])
    return Source(items=lines, read=partial(_read_line, field, content))


def array_record_source(path: Path, field: str = "", content: Format = "text") -> Source:
    """Returns the records of an ArrayRecord file, or of a folder's.

    Without a `field` a record is utf-8 text, with one it is a JSON object that has the field.

    Raises: FileNotFoundError for a missing file; ValueError for one that is not ArrayRecord.
    """
    import grain

    files = files_of(path, "**/*.array_record*", "ArrayRecord")
    try:
        items = grain.sources.ArrayRecordDataSource([str(file) for file in files])
    except (ValueError, RuntimeError):
        raise InputError(f"{path}: not made of complete ArrayRecord files") from None
    read = partial(_read_record, field, content, path.as_posix())
    return Source(items=Numbered(items), read=read)


def parquet_source(path: Path, field: str = "text", content: Format = "text") -> Source:
    """Returns the rows of a Parquet file, or of a folder's, as records; only column `field` is read.

    A row group at a time is in memory.

    Raises: FileNotFoundError for a missing file; ValueError when pyarrow is not installed, a file is
        not Parquet, or has no such column.
    """
    files = files_of(path, "**/*.parquet", "Parquet")
    cells = Joined([_Table(file, field) for file in files])
    return Source(items=cells, read=partial(_read_cell, content))


def files_of(path: Path, pattern: str, kind: str) -> list[Path]:
    """Returns `path` if it is a file, else the files below it that match `pattern`, sorted.

    Raises: FileNotFoundError when there is none.
    """
    refuse_address(path)
    if path.is_file():
        return [path]
    found = sorted(file for file in path.glob(pattern) if file.is_file())
    if not found:
        raise FileNotFoundError(
            f"{kind} source {path}: expected a file, or a folder with {pattern}"
        )
    return found


def _read_text(file: Path) -> Record:
    return take("", "text", file.as_posix(), file.read_bytes())


class _Lines:
    """The lines of a file that hold something: `lines[i]` is (file, number from 1, offset)."""

    def __init__(self, path: Path) -> None:
        self._path, found, offset = path, array.array("q"), 0
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.isspace():
                    found.extend((number, offset))
                offset += len(line)
        self._lines = np.frombuffer(found, np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> tuple[Path, int, int]:
        number, offset = self._lines[index]
        return self._path, int(number), int(offset)


def _read_line(field: str, content: Format, item: tuple[Path, int, int]) -> Record:
    path, number, offset = item
    with path.open("rb") as file:
        file.seek(offset)
        line = file.readline()
    where = f"{path.as_posix()}:{number}"
    return take(field, content, where, _object(line, where))


def _read_record(field: str, content: Format, path: str, item: tuple[int, bytes]) -> Record:
    where, value = f"{path}:{item[0]}", item[1]
    return take(field, content, where, _object(value, where) if field else value)


def _object(value: bytes, where: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        raise InputError(f"{where}: expected one JSON object") from None


class _Table:
    """The cells of a column of a Parquet file: `table[i]` is (where it is, its value)."""

    def __init__(self, path: Path, column: str) -> None:
        file = _parquet_file(path)
        names = file.schema_arrow.names
        if column not in names:
            raise unknown(f"column of {path}", column, names)
        groups = range(file.metadata.num_row_groups)
        self._path, self._column = path, column
        self._ends = np.cumsum([file.metadata.row_group(group).num_rows for group in groups])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> tuple[str, Any]:
        group = int(np.searchsorted(self._ends, index, side="right"))
        start = int(self._ends[group - 1]) if group else 0
        value = _row_group(self._path, self._column, group)[index - start].as_py()
        return f"{self._path.as_posix()}:{index}", value


def _read_cell(content: Format, item: tuple[str, Any]) -> Record:
    return take("", content, *item)


@functools.lru_cache(maxsize=1)  # documents are read in order: the row group at hand is read once
def _row_group(path: Path, column: str, group: int) -> Any:
    return _parquet_file(path).read_row_group(group, columns=[column]).column(0)


def _parquet_file(path: Path) -> Any:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise InputError(
            f"{path}: reading Parquet needs pyarrow: pip install 'gemma_qat[parquet]'"
        ) from None
    try:
        return parquet.ParquetFile(path)
    except (ValueError, OSError):  # what pyarrow raises for a file of another kind
        raise InputError(f"{path}: not a complete Parquet file") from None
