"""Rows on disk: the same whoever makes them, and whatever is stopped on the way."""

from __future__ import annotations

import dataclasses
import errno
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from array_record.python import array_record_module

from gemma_qat.data import (
    Encoded,
    Plan,
    Record,
    Rows,
    Source,
    StoredRows,
    pack,
    stored_rows,
    targets,
)
from gemma_qat.data.packing import positions_of
from gemma_qat.errors import InputError


def encode(records: Sequence[Record]) -> list[Encoded]:
    """Document i is 10 i, 10 i + 1, ... of (i * 5) % 9 tokens; the even ones are learned."""
    ids = [np.arange((i * 5) % 9, dtype=np.int32) + 10 * i for i in (r["n"] for r in records)]
    return [Encoded(one, (one + 1) % 2) for one in ids]


def source(count: int = 23) -> Source:
    """Documents that say their number."""
    return Source(items=range(count), read=lambda number: {"n": number})


PLAN = Plan(encode=encode, length=6, block=4)


def no_source() -> Source:
    """Fails when a source is opened."""
    raise AssertionError("opened")


def fields(rows: Rows) -> dict[str, list[list[int]]]:
    """The arrays of rows by name."""
    return {field.name: getattr(rows, field.name).tolist() for field in dataclasses.fields(rows)}


def files(directory: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that one process made."""
    directory = tmp_path_factory.mktemp("whole") / "rows"
    stored_rows(directory, source, PLAN)
    return directory


def test_blocks_are_packed_like_documents_in_memory(whole: Path) -> None:
    """Broken: what is read from disk would differ from what was packed."""
    rows = stored_rows(whole, no_source, PLAN)
    documents = encode(list(source()))
    expected: list[dict[str, Any]] = []
    for start in range(0, 23, 4):
        part = documents[start : start + 4]
        packed = pack([d.ids for d in part], 6, learn=[d.learn for d in part])
        packed.documents[packed.documents >= 0] += start
        expected.append(fields(packed))
    read = fields(rows[:])
    assert read == {name: [row for one in expected for row in one[name]] for name in read}
    assert fields(rows[np.array([7, 0, 7])])["tokens"] == [read["tokens"][i] for i in (7, 0, 7)]
    used = sum(len(d.ids) for d in documents)
    assert sum(row != 0 for one in read["segments"] for row in one) == used
    assert rows.efficiency == used / (6 * len(rows)) and rows.dropped == 0
    card = json.loads((whole / "card.json").read_text())
    assert (card["documents"], card["tokens"], card["rows"]) == (23, used, len(rows))
    assert card["efficiency"] == rows.efficiency
    assert all(array.dtype == np.int32 for array in vars(rows[:2]).values())


def test_every_piece_begins_with_bos_and_nothing_else_changes(tmp_path: Path) -> None:
    """Broken: rows that continue a text would lack `bos`, or a token would be lost, repeated or taught that was put in."""
    bos, length = 9999, 5
    documents = [np.r_[bos, np.arange(size) + 100 * i] for i, size in enumerate(range(1, 23))]
    learn = [
        (one % 3 > 0).astype(np.int32) for one in documents
    ]  # bos of a document is learned here

    def encoded(records: Sequence[Record]) -> list[Encoded]:
        return [Encoded(documents[r["n"]].astype(np.int32), learn[r["n"]]) for r in records]

    plan = Plan(encode=encoded, length=length, block=8, bos=True)
    rows = stored_rows(tmp_path / "with", lambda: source(len(documents)), plan)[:]
    begins = (rows.positions == 0) & (rows.segments > 0)
    assert (rows.tokens[begins] == bos).all() and begins.sum() > len(documents)
    wanted, weights = targets(rows)
    assert (wanted[weights > 0] != bos).all()
    for number, (ids, kept) in enumerate(zip(documents, learn, strict=True)):
        mine = rows.documents == number
        body = rows.tokens[mine & ~begins]
        order = np.argsort(body)  # a document's tokens rise, its pieces may lie in any rows
        np.testing.assert_array_equal(body[order], ids[1:])
        np.testing.assert_array_equal(rows.learn[mine & ~begins][order], kept[1:])
        pieces = -(-(len(ids) - 1) // (length - 1))
        assert (mine & begins).sum() == pieces
        assert rows.learn[mine & begins].sum() == kept[0]  # those put in are not to be learned
    np.testing.assert_array_equal(rows.positions, positions_of(rows.segments))
    # What is not cut (conversations) is as it was.
    whole = dataclasses.replace(plan, cut=False)
    kept_whole = stored_rows(tmp_path / "whole", lambda: source(len(documents)), whole)
    bare = dataclasses.replace(whole, bos=False)
    same = stored_rows(tmp_path / "bare", lambda: source(len(documents)), bare)
    assert kept_whole.digest == same.digest


@pytest.mark.parametrize("count", [2, 3, 9])
def test_any_number_of_processes_makes_the_same_files(
    whole: Path, tmp_path: Path, count: int
) -> None:
    """Broken: rows, and so batches, would depend on how many hosts a run has."""
    for index in range(count):
        stored_rows(tmp_path, source, PLAN, shard_index=index, shard_count=count)
    assert files(tmp_path) == files(whole)


def test_what_was_stopped_is_gone_on_with(whole: Path, tmp_path: Path) -> None:
    """Broken: a killed process would leave half a block, or work would be done twice."""
    seen: list[int] = []

    def failing(records: Sequence[Record]) -> list[Encoded]:
        seen.extend(record["n"] for record in records)
        if len(seen) == 12 and records[0]["n"] == 8:
            raise KeyboardInterrupt
        return encode(records)

    plan = dataclasses.replace(PLAN, encode=failing)
    with pytest.raises(KeyboardInterrupt):
        stored_rows(tmp_path, source, plan)
    assert (
        sorted(path.suffix for path in tmp_path.iterdir()) == [".array_record"] * 2 + [".json"] * 2
    )
    stored_rows(tmp_path, source, plan)
    assert seen == [*range(12), *range(8, 23)]
    assert files(tmp_path) == files(whole)


@pytest.mark.parametrize("what", ["rows", "what is in them", "card", "folder"])
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Broken: a traceback, and files under temporary names that take what room there is left."""
    writer, write = array_record_module.ArrayRecordWriter, Path.write_text

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    def third(path: str, how: str) -> Any:
        """Writes the third block where there is never room: the library's own error, which it keeps until it closes."""
        return writer("/dev/full" if (tmp_path / "00001.json").is_file() else path, how)

    def some(path: Path, *rest: Any, **how: Any) -> int:
        if path.name == ("card.json" if what == "card" else "00002.json"):
            full()
        return write(path, *rest, **how)

    with monkeypatch.context() as patch:
        if what == "rows":
            patch.setattr(array_record_module, "ArrayRecordWriter", third)
        elif what == "folder":
            patch.setattr("gemma_qat.data.store.tempfile.TemporaryDirectory", full)
        else:
            patch.setattr(Path, "write_text", some)
        with pytest.raises(InputError) as failed:
            stored_rows(tmp_path, source, PLAN)
    assert "rows cannot be written (" in str(failed.value) and "\n" not in str(failed.value)
    assert "No space left on device); complete blocks are kept" in str(failed.value)
    assert not list(tmp_path.glob(".making*")) and not (tmp_path / "card.json").exists()
    complete = {"rows": 2, "what is in them": 2, "card": 6, "folder": 0}[what]
    assert len(list(tmp_path.glob("0*.json"))) == complete
    stored_rows(tmp_path, source, PLAN)
    assert files(tmp_path) == files(whole)


def test_an_error_of_reading_is_not_one_of_writing(tmp_path: Path) -> None:
    """Broken: a source that went away would be blamed on the disk of the rows."""

    def gone(records: Sequence[Record]) -> list[Encoded]:
        raise OSError(errno.EIO, "source gone")

    with pytest.raises(OSError, match="source gone"):
        stored_rows(tmp_path, source, dataclasses.replace(PLAN, encode=gone))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["truncated", "removed", "not named"])
def test_damage_is_made_good(whole: Path, tmp_path: Path, damage: str) -> None:
    """Broken: a run would train on a truncated file, or fail where it could repair."""
    for name, content in files(whole).items():
        (tmp_path / name).write_bytes(content)
    block = tmp_path / "00002.array_record"
    if damage == "truncated":
        block.write_bytes(block.read_bytes()[:70_000])
    elif damage == "removed":
        block.unlink()
    else:
        (tmp_path / "00002.json").unlink()
        (tmp_path / "card.json").write_text("{")
    stored_rows(tmp_path, source, PLAN)
    assert files(tmp_path) == files(whole)


def test_several_at_once(whole: Path, tmp_path: Path) -> None:
    """Broken: hosts that share a disk would trip over each other's files, or wait for each other.

    Threads stand for processes: nothing but the folder is shared.
    """

    def one(index: int) -> StoredRows:
        return stored_rows(tmp_path, source, PLAN, shard_index=index, shard_count=3)

    with ThreadPoolExecutor(3) as pool:
        made = list(pool.map(one, range(3)))
    rows = stored_rows(whole, no_source, PLAN)
    assert [one.digest for one in made] == [rows.digest] * 3
    assert files(tmp_path) == files(whole)


def test_what_is_not_cut_is_dropped_and_counted(tmp_path: Path) -> None:
    """Broken: the tail of a long conversation would be trained on without what was asked."""
    rows = stored_rows(tmp_path, source, dataclasses.replace(PLAN, cut=False))
    sizes = [len(one.ids) for one in encode(list(source()))]
    assert rows.dropped == sum(max(size - 6, 0) for size in sizes) > 0
    kept = rows[:]
    assert (kept.segments > 0).sum() == sum(min(size, 6) for size in sizes)
    first = kept.tokens[(kept.positions == 0) & (kept.segments > 0)]
    assert (first % 10 == 0).all(), "every segment is the beginning of its document"


def test_memory_is_bounded_by_what_is_packed_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken: a block of long documents would not fit into memory; packing in parts loses a token."""
    monkeypatch.setattr("gemma_qat.data.store._TOGETHER", 2)
    monkeypatch.setattr("gemma_qat.data.store._PACKED_TOKENS", 9)
    monkeypatch.setattr("gemma_qat.data.store._PACKED_ROWS", 1)
    rows = stored_rows(tmp_path, source, dataclasses.replace(PLAN, block=23))[:]
    expected = {
        (number, int(token))
        for number, one in enumerate(encode(list(source())))
        for token in one.ids
    }
    real = rows.segments > 0
    pairs = list(zip(rows.documents[real].tolist(), rows.tokens[real].tolist(), strict=True))
    assert len(pairs) == len(expected) and set(pairs) == expected


def test_no_documents_are_an_error(tmp_path: Path) -> None:
    """Broken: an empty corpus would be found out in the loader."""
    with pytest.raises(InputError, match="no documents to make rows of"):
        stored_rows(tmp_path / "rows", lambda: source(0), PLAN)
