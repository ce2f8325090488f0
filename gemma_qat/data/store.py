"""Rows on disk: a corpus of any size, tokenized and packed once, then read by row number.

    DIRECTORY/card.json             rows, tokens, efficiency; written last, when every block is there
    DIRECTORY/00042.array_record    the rows of block 42: one record a row, int32 [4, T] of its tokens,
                                    segments, documents and learn (positions follow from segments)
    DIRECTORY/00042.json            what is in it; a block without one is not complete

A block is the rows of a fixed run of documents, so it depends on nothing but those: any process can
make any block, and two that make the same one write the same rows. That is the whole protocol. Each
process of a run makes its share, then helps with what is still missing, last block first, and is done
when all are there. On a shared disk N processes do an Nth of the work each; where every host has a
disk of its own, each makes all. A killed process leaves complete blocks behind, and so does a full disk;
nobody waits for either. Rows and their numbers do not depend on how many processes there were.

Why so: training needs row i of M for any i, in any order, on any number of hosts, and needs it again
after a resume. A row on disk is that; a pipeline that tokenizes and packs as it streams would have to
replay or save its buffers on every host. Memory is bounded by the tokens packed at a time, not by the
corpus. ArrayRecord compresses rows (to 1 to 3 bytes a token) and reads any of them.

Source: ArrayRecord and its Grain source (github.com/google/grain, `ArrayRecordDataSource`).
"""

from __future__ import annotations

import json
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemma_qat.data.encode import Encoded, Encoder, behind_bos
from gemma_qat.data.packing import Progress, Rows, pack, positions_of
from gemma_qat.data.records import Source
from gemma_qat.errors import InputError

BLOCK = 8192
"""Documents of a block."""

_TOGETHER = 128  # documents handed to the tokenizer at a time
_PACKED_TOKENS, _PACKED_ROWS = 1 << 22, 64  # a packing holds at least so many of both, if there are


@dataclass(frozen=True, kw_only=True)
class Block:
    """What one block holds. `dropped` counts tokens beyond the row of a document that is not cut."""

    documents: int
    rows: int
    tokens: int
    dropped: int
    digest: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a source becomes rows: everything that they depend on but the source.

    With `cut` a document longer than a row goes on in another, with `bos` behind its first token
    again; without `cut`, what does not fit is dropped and counted.
    """

    encode: Encoder
    length: int
    cut: bool = True
    bos: bool = False
    block: int = BLOCK


class StoredRows:
    """The rows of a directory, read when asked for; safe to read from threads."""

    def __init__(self, directory: Path, length: int, blocks: Sequence[Block]) -> None:
        """Opens what `stored_rows` made."""
        import grain

        self.length, self.blocks = length, tuple(blocks)
        files = [f"{_file(directory, n)}[0:{block.rows}]" for n, block in enumerate(blocks)]
        self._records = grain.sources.ArrayRecordDataSource(files)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: slice | np.ndarray) -> Rows:
        """Returns some of the rows, in memory."""
        numbers = np.arange(len(self))[index] if isinstance(index, slice) else index
        records = [np.frombuffer(self._records[int(number)], np.int32) for number in numbers]
        planes = np.array(records, np.int32).reshape(len(numbers), 4, self.length)
        tokens, segments, documents, learn = (planes[:, plane] for plane in range(4))
        return Rows(
            tokens=tokens,
            segments=segments,
            positions=positions_of(segments),
            documents=documents,
            learn=learn,
        )

    @property
    def digest(self) -> int:
        """A checksum of the rows, taken when they were made."""
        return zlib.crc32(json.dumps([block.digest for block in self.blocks]).encode())

    @property
    def efficiency(self) -> float:
        """The share of places that hold a token, 0 to 1."""
        return sum(block.tokens for block in self.blocks) / (len(self) * self.length)

    @property
    def dropped(self) -> int:
        """Tokens of documents that did not fit into a row and are not cut."""
        return sum(block.dropped for block in self.blocks)


def stored_rows(
    directory: Path,
    source: Callable[[], Source],
    plan: Plan,
    *,
    progress: Progress | None = None,
    shard_index: int = 0,
    shard_count: int = 1,
) -> StoredRows:
    """Returns the rows of a source by `plan`, made now if `directory` does not hold all of them.

    What they depend on has to be in the directory's name: it is not looked at again. `source` is
    called only when something is missing.

    Raises: InputError for a source without documents, a document that cannot be read, or a directory
        that cannot be written to (a full disk): the same call goes on from what was complete.
    Exactness: the same rows whatever the number of shards, and whatever was stopped on the way.
    """
    blocks = _complete(directory)
    if blocks is None:
        opened = source()
        if not len(opened):
            raise InputError(f"{directory}: no documents to make rows of")
        with _writing(directory):
            directory.mkdir(parents=True, exist_ok=True)
        blocks = _make(directory, opened, plan, progress, shard_index, shard_count)
        with _writing(directory):
            _write_card(directory, plan.length, blocks)
    return StoredRows(directory, plan.length, blocks)


def kept(directory: Path, length: int) -> StoredRows | None:
    """Returns the rows of a directory, None unless it holds all of them."""
    blocks = _complete(directory)
    return None if blocks is None else StoredRows(directory, length, blocks)


def _make(
    directory: Path,
    source: Source,
    plan: Plan,
    progress: Progress | None,
    shard_index: int,
    shard_count: int,
) -> list[Block]:
    count = -(-len(source) // plan.block)
    share = range(shard_index, count, shard_count)
    others = [number for number in reversed(range(count)) if number not in share]
    for done, number in enumerate([*share, *others], start=1):
        if _read_block(directory, number) is None:
            _write_block(directory, number, source, plan)
        if progress is not None:
            progress("tokenize", min(done * plan.block, len(source)), len(source))
    blocks = [_read_block(directory, number) for number in range(count)]
    whole = [block for block in blocks if block is not None]
    if len(whole) < count:
        raise InputError(f"{directory}: rows went away while others were made")
    return whole


def _write_block(directory: Path, number: int, source: Source, plan: Plan) -> None:
    """Makes a block under a name of its own, then gives it its name, then says that it is complete."""
    from array_record.python import array_record_module

    documents = range(number * plan.block, min((number + 1) * plan.block, len(source)))
    rows = tokens = dropped = digest = 0
    with ExitStack() as stack:
        with _writing(directory):
            path = stack.enter_context(_making(directory)) / "rows"
            writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
        for packed, left in _packed(source, documents, plan):
            with _writing(directory):
                for record in _records(packed):
                    writer.write(record)
                    digest = zlib.crc32(record, digest)
            rows, dropped = rows + len(packed), dropped + left
            tokens += int((packed.segments > 0).sum())
        with _writing(directory):
            writer.close()
            block = Block(
                documents=len(documents), rows=rows, tokens=tokens, dropped=dropped, digest=digest,
                bytes=path.stat().st_size,
            )  # fmt: skip
            path.replace(_file(directory, number))
            _write_json(_card_of(directory, number), asdict(block))


@contextmanager
def _making(directory: Path) -> Iterator[Path]:
    """A folder beside what is being made, gone with what it holds when that has its name or will not get one."""
    with tempfile.TemporaryDirectory(prefix=".making.", dir=directory) as folder:
        yield Path(folder)


@contextmanager
def _writing(directory: Path) -> Iterator[None]:
    """Says in one line that something could not be written; errors of reading and encoding stay outside."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # ArrayRecord's are RuntimeErrors, said when it closes
        said = getattr(error, "strerror", None) or str(error).split(";")[0]
        raise InputError(
            f"{directory}: rows cannot be written ({said}); complete blocks are kept, the same command goes on"
        ) from error


def _packed(source: Source, documents: range, plan: Plan) -> Iterator[tuple[Rows, int]]:
    """Packs as many documents at a time as fit in memory; documents keep the source's numbers."""
    enough = max(_PACKED_TOKENS, _PACKED_ROWS * plan.length)
    held: list[Encoded] = []
    first = documents.start
    for start in range(documents.start, documents.stop, _TOGETHER):
        stop = min(start + _TOGETHER, documents.stop)
        held += plan.encode([source[number] for number in range(start, stop)])
        if stop == documents.stop or sum(len(one.ids) for one in held) >= enough:
            yield _pack(held, plan, first)
            held, first = [], stop


def _pack(held: list[Encoded], plan: Plan, first: int) -> tuple[Rows, int]:
    most = None if plan.cut else plan.length
    if plan.cut and plan.bos:
        held = [behind_bos(one, plan.length) for one in held]
    rows = pack(
        [one.ids[:most] for one in held], plan.length, learn=[one.learn[:most] for one in held]
    )
    rows.documents[rows.documents >= 0] += first
    dropped = 0 if plan.cut else sum(max(len(one.ids) - plan.length, 0) for one in held)
    return rows, dropped


def _records(rows: Rows) -> Iterator[bytes]:
    planes = (rows.tokens, rows.segments, rows.documents, rows.learn)
    return (np.stack(row).tobytes() for row in zip(*planes, strict=True))


def _file(directory: Path, number: int) -> Path:
    return directory / f"{number:05d}.array_record"


def _card_of(directory: Path, number: int) -> Path:
    return directory / f"{number:05d}.json"


def _read_block(directory: Path, number: int) -> Block | None:
    """What a block holds; None if it is missing, not finished or cut short."""
    found = _read_json(_card_of(directory, number))
    return _checked(directory, number, found) if found else None


def _checked(directory: Path, number: int, found: dict[str, Any]) -> Block | None:
    path = _file(directory, number)
    block = Block(**found)
    return block if path.is_file() and path.stat().st_size == block.bytes else None


def _complete(directory: Path) -> list[Block] | None:
    card = _read_json(directory / "card.json")
    blocks = (
        [_checked(directory, n, found) for n, found in enumerate(card["blocks"])] if card else []
    )
    whole = [block for block in blocks if block is not None]
    return whole if whole and len(whole) == len(blocks) else None


def _write_card(directory: Path, length: int, blocks: Sequence[Block]) -> None:
    rows, tokens = sum(block.rows for block in blocks), sum(block.tokens for block in blocks)
    card = {
        "documents": sum(block.documents for block in blocks),
        "rows": rows,
        "tokens": tokens,
        "efficiency": tokens / (rows * length),
        "blocks": [asdict(block) for block in blocks],
    }
    _write_json(directory / "card.json", card)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    with _making(path.parent) as folder:
        made = folder / path.name
        made.write_text(json.dumps(value, indent=1), encoding="utf-8")
        made.replace(path)


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
