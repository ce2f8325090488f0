"""Documents of any length -> rows of one length, with nothing lost and nothing repeated.

A document is cut into pieces of at most T tokens. A piece is a *segment* of its row: positions
restart at 0, attention and targets stay inside it. Full pieces fill a row each; the tails are mixed
so that little padding is left:

    tokens     a a a a b b b c c .        three tails in one row, `.` is padding
    segments   1 1 1 1 2 2 2 3 3 0
    positions  0 1 2 3 0 1 2 0 1 0
    documents  7 7 7 7 2 2 2 5 5 -1
    learn      1 1 1 1 1 1 1 1 1 0        of a conversation, what the model says
    weights    1 1 1 0 1 1 0 1 0 0        the next token is in the segment, and to be learned

Tails are placed longest first, each into the row with the least room that still holds it (best-fit
decreasing): at most 11/9 of the fewest rows possible plus one (Johnson et al. 1974), and
deterministic. For evaluation rows are not mixed: each holds one document, so that per-file numbers
are sums over whole rows. Packing holds its documents in memory; `store` packs a corpus in parts.

Cutting costs one target per cut (a piece's first token), which `weights` shows, unless `bos` was put in
front of every piece before (`encode.behind_bos`).
"""

from __future__ import annotations

import bisect
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32

from gemma_qat.data.records import Source
from gemma_qat.data.tokenizer import Tokenizer
from gemma_qat.errors import InputError

Progress = Callable[[str, int, int], None]
Ids = Sequence[int] | np.ndarray


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Packed tokens, all int32 [M, T].

    `segments` counts from 1 within a row, 0 is padding; `positions` restart at 0 with each segment;
    `documents` is the index of the document a token came from, -1 on padding; `learn` is 1 on tokens
    that may be predicted, else 0.
    """

    tokens: np.ndarray
    segments: np.ndarray
    positions: np.ndarray
    documents: np.ndarray
    learn: np.ndarray

    @property
    def digest(self) -> int:
        """A checksum of what is trained on: a loader's state is only good for the rows it was taken on."""
        found = 0
        for array in (self.tokens, self.segments, self.learn):
            found = zlib.crc32(np.ascontiguousarray(array).data, found)
        return found

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: slice | np.ndarray) -> Rows:
        """Returns some of the rows."""
        return Rows(
            tokens=self.tokens[index],
            segments=self.segments[index],
            positions=self.positions[index],
            documents=self.documents[index],
            learn=self.learn[index],
        )


class _Place(NamedTuple):
    """Where a piece goes: its row, its first column, its number in the row."""

    row: int
    column: int
    segment: int


def pack(
    documents: Sequence[Ids], length: int, *, mix: bool = True, learn: Sequence[Ids] | None = None
) -> Rows:
    """Packs documents into rows of `length` tokens; padding is token 0 in segment 0.

    With `mix` the tails of several documents share a row; without, a row holds one document only
    and rows keep the order of the documents. `learn` has a 0 or 1 for every token of every document;
    without it all are learned.

    Raises: ValueError if `length` is less than 2 (a row could hold no target).
    Exactness: every token of every document is in the rows exactly once; same input, same rows.
    """
    if length < 2:
        raise InputError(f"pack: length {length}, expected at least 2")
    pieces = [  # (document, size) in order of the text
        (index, min(length, len(document) - start))
        for index, document in enumerate(documents)
        for start in range(0, len(document), length)
    ]
    sizes = [size for _, size in pieces]
    places = _best_fit(sizes, length) if mix else [_Place(row, 0, 1) for row in range(len(pieces))]
    flat = _flat(documents)
    learned = np.ones_like(flat) if learn is None else _flat(learn)
    return _laid_out(flat, learned, pieces, places, length)


def positions_of(segments: Int32[np.ndarray, "M T"]) -> Int32[np.ndarray, "M T"]:
    """Returns the positions that belong to segments: from 0 in each, 0 on padding."""
    column = np.arange(segments.shape[1], dtype=np.int32)
    begins = np.diff(segments, axis=1, prepend=0) != 0
    start = np.maximum.accumulate(np.where(begins, column, 0), axis=1)
    return np.where(segments > 0, column - start, 0).astype(np.int32)


def efficiency(rows: Rows) -> float:
    """Returns the share of places that hold a token, 0 to 1; 0 for no rows."""
    return float(np.mean(rows.segments > 0)) if rows.segments.size else 0.0


def targets(rows: Rows) -> tuple[Int32[np.ndarray, "M T"], Float32[np.ndarray, "M T"]]:
    """Returns the next token within the same segment, and weight 1 where it is to be learned, else 0.

    Shapes: targets [M, T] int32, 0 at a segment's end and on padding; weights [M, T] float32.
    """
    inside = (rows.segments[:, 1:] == rows.segments[:, :-1]) & (rows.segments[:, 1:] > 0)
    next_tokens = np.zeros_like(rows.tokens)
    next_tokens[:, :-1] = np.where(inside, rows.tokens[:, 1:], 0)
    weights = np.zeros(rows.tokens.shape, np.float32)
    weights[:, :-1] = inside & (rows.learn[:, 1:] > 0)
    return next_tokens, weights


def tokenize(
    source: Source, tokenizer: Tokenizer, progress: Progress | None = None
) -> list[list[int]]:
    """Returns the ids of each document of a source, bos first and eos last."""
    documents = []
    for done, record in enumerate(source, start=1):
        documents.append(tokenizer.encode(record["text"], bos=True, eos=True))
        if progress is not None:
            progress("tokenize", done, len(source))
    return documents


def _best_fit(sizes: Sequence[int], length: int) -> list[_Place]:
    """Best-fit decreasing; ties go to the earlier piece and the row opened last."""
    places: list[_Place | None] = [None] * len(sizes)
    rooms: list[int] = []  # the distinct amounts of room, sorted; at most `length` of them
    rows_with: dict[int, list[tuple[int, int]]] = {}  # room -> (row, segments in it)
    opened = 0
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        size = sizes[index]
        at = bisect.bisect_left(rooms, size)
        if at == len(rooms):
            room, row, segments, opened = length, opened, 0, opened + 1
        else:
            room = rooms[at]
            row, segments = rows_with[room].pop()
            if not rows_with[room]:
                del rows_with[room], rooms[at]
        places[index] = _Place(row, length - room, segments + 1)
        if left := room - size:
            if left not in rows_with:
                bisect.insort(rooms, left)
            rows_with.setdefault(left, []).append((row, segments + 1))
    return [place for place in places if place is not None]


def _flat(documents: Sequence[Ids]) -> np.ndarray:
    parts = [np.asarray(document, np.int32) for document in documents]
    return np.concatenate(parts) if parts else np.zeros(0, np.int32)


def _laid_out(
    flat: np.ndarray,
    learn: np.ndarray,
    pieces: list[tuple[int, int]],
    places: list[_Place],
    length: int,
) -> Rows:
    """Writes each token of `flat` (all pieces in order) to the place of its piece."""
    document, size = np.array(pieces, np.int64).reshape(-1, 2).T
    row, column, segment = np.array(places, np.int64).reshape(-1, 3).T
    within = np.arange(len(flat)) - np.repeat(np.cumsum(size) - size, size)
    at = np.repeat(row, size), np.repeat(column, size) + within
    count = int(row.max()) + 1 if len(row) else 0

    def filled(values: np.ndarray, padding: int) -> np.ndarray:
        array = np.full((count, length), padding, np.int32)
        array[at] = values
        return array

    return Rows(
        tokens=filled(flat, 0),
        segments=filled(np.repeat(segment, size), 0),
        positions=filled(within, 0),
        documents=filled(np.repeat(document, size), -1),
        learn=filled(learn, 0),
    )
