"""The Python standard library as a corpus: 12 MB that every machine with Python already has.

No download, a known licence, and real structure to learn. Tests and installed packages are left
out, so two machines with the same Python release see nearly the same documents (`_sysconfigdata*`
and a few distribution patches differ).

Which split a file belongs to depends on its path alone: adding or removing a file moves no other
file from one split to another, and a path keeps its split across Python releases. A held-out file
that mostly repeats training files belongs to none: one code page of many is no text that nobody
trained on, and a model that does well on it shows that it remembers.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Split = Literal["train", "validation", "test"]

SPLITS: tuple[str, ...] = ("train", "validation", "test")

# Folder names that are not the library itself, wherever they appear (`tests` holds lib2to3's data).
_LEFT_OUT = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
)

# Of 100 buckets: 0-3 test, 4-6 validation, the rest train.
_TEST_BELOW, _VALIDATION_BELOW, _BUCKETS = 4, 7, 100

# Characters of a line that says something, indentation aside: `else:` stands in every file.
_LINE = 16


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text with the name it is known by."""

    path: str
    text: str


def collect(root: Path | None = None) -> list[Document]:
    """Returns every readable, non-empty utf-8 `.py` file of the standard library, sorted by path.

    Paths are posix and relative to `root` (default: the running interpreter's library). Line ends
    and byte-order marks are kept: the text is the file.

    Raises: FileNotFoundError if `root` is not a folder.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    if not root.is_dir():
        raise FileNotFoundError(f"standard library folder {root}: not a folder")
    documents = []
    for file in _python_files(root):
        text = _text_of(file)
        if text:
            documents.append(Document(path=file.relative_to(root).as_posix(), text=text))
    return sorted(documents, key=lambda document: document.path)


def split_of(path: str) -> Split:
    """Returns the split of a document from a hash of its path, never from its position.

    Exactness: the same on every machine and Python release (sha256 modulo 100).
    """
    bucket = path_order(path) % _BUCKETS
    if bucket < _TEST_BELOW:
        return "test"
    return "validation" if bucket < _VALIDATION_BELOW else "train"


def by_split(documents: Sequence[Document]) -> dict[str, list[Document]]:
    """Returns the documents of every split, in their order; held-out ones that are copies are left out.

    A copy is a document of which more than half of the lines of 16 characters or more, indentation
    aside, stand in documents to train on as they are.
    """
    splits: dict[str, list[Document]] = {split: [] for split in SPLITS}
    for document in documents:
        splits[split_of(document.path)].append(document)
    trained = {line for document in splits["train"] for line in _lines(document.text)}
    for held_out in ("validation", "test"):
        splits[held_out] = [d for d in splits[held_out] if not _is_copy(d.text, trained)]
    return splits


def _lines(text: str) -> list[str]:
    return [line for line in map(str.strip, text.splitlines()) if len(line) >= _LINE]


def _is_copy(text: str, trained: set[str]) -> bool:
    lines = _lines(text)
    return 2 * sum(line in trained for line in lines) > len(lines)


def path_order(path: str) -> int:
    """Returns the sha256 of a path as an integer: a fixed pseudo-random order of documents."""
    return int.from_bytes(hashlib.sha256(path.encode("utf-8")).digest(), "big")


def _python_files(root: Path) -> Iterator[Path]:
    for folder, names, files in os.walk(root):
        # os.walk descends into what is left in `names`.
        names[:] = [name for name in names if name not in _LEFT_OUT]
        yield from (Path(folder, name) for name in files if name.endswith(".py"))


def _text_of(file: Path) -> str | None:
    try:
        return file.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError):  # unreadable, a dangling link, or not utf-8
        return None
