"""What a source is: documents by number, each read when asked for.

A container (a folder of text, JSON lines, Parquet, ArrayRecord, TFDS) gives values; `take` makes a
record of one: the text of a document, the messages of a conversation, or token ids. So every container
holds any of them, and none knows of the others.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gemma_qat.errors import InputError

Format = Literal["text", "chat", "ids"]
"""What a document is: one text, a conversation, or token ids that are read as they are."""

Record = dict[str, Any]
"""`path` says where a document came from; `text` (a str), `messages` or `ids` (lists) what it says."""

_CONTENT = {
    "text": ("text", "a string", str),
    "chat": ("messages", "a list of messages", list),
    "ids": ("ids", "a list of token ids", list),
}


@dataclass(frozen=True, kw_only=True)
class Source:
    """Documents by number: `source[i]` is a record such as `{'path': str, 'text': str}`.

    Satisfies Grain's random-access protocol (`len` and `[]`) and can be iterated.
    """

    items: Any  # something with `len` and `[]`: what `read` turns into a record
    read: Callable[[Any], Record]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Record:
        return self.read(self.items[index])

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))


class Joined:
    """Several things with `len` and `[]`, one after another."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self._parts = tuple(parts)
        self._ends = list(itertools.accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(f"{index} of {len(self)}")
        part = bisect.bisect_right(self._ends, index)
        return self._parts[part][index - (self._ends[part - 1] if part else 0)]


class Numbered:
    """The elements of something with `len` and `[]`, each with its number."""

    def __init__(self, elements: Any) -> None:
        self._elements = elements

    def __len__(self) -> int:
        return len(self._elements)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, self._elements[index]


def default_field(content: Format) -> str:
    """Returns the field that holds a document where none is named: `text`, `messages` or `ids`."""
    return _CONTENT[content][0]


def take(field: str, content: Format, where: str, value: Any) -> Record:
    """Returns the record of what lies under `field` of `value` (of `value` itself where `field` is empty).

    Bytes are read as utf-8. Messages that were stored column by column (`{'role': [...], 'content': [...]}`, what
    TFDS makes of a sequence of features) are put together again.

    Raises: InputError naming `where` when the field is missing or holds something else.
    """
    key, said, kind = _CONTENT[content]
    if field:
        if not isinstance(value, Mapping) or field not in value:
            raise InputError(f"{where}: expected an object with {said} under {field!r}")
        value = value[field]
    if isinstance(value, Mapping) and content == "chat":
        columns = [[*map(_decoded, column)] for column in value.values()]
        value = [dict(zip(value, turn, strict=True)) for turn in zip(*columns, strict=True)]
    if content == "ids" and hasattr(value, "tolist"):  # what TFDS makes of a sequence of numbers
        value = value.tolist()
    value = _decoded(value, where)
    if not isinstance(value, kind):
        under = f"an object with {said} under {field!r}" if field else said
        raise InputError(f"{where}: expected {under}")
    return {"path": where, key: value}


def _decoded(value: Any, where: str = "") -> Any:
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: expected utf-8 text, byte {error.start} is not") from None
