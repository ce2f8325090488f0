"""Text, JSON lines, Parquet and ArrayRecord files as random-access records."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from gemma_qat.data import (
    array_record_source,
    jsonl_source,
    parquet_source,
    text_source,
)
from gemma_qat.errors import InputError

TALK = [{"role": "user", "content": "\u00e9?"}, {"role": "assistant", "content": "yes"}]


def write_records(path: Path, records: Sequence[bytes]) -> Path:
    """Writes an ArrayRecord file as any other program would."""
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    return path


def write_parquet(path: Path, columns: dict[str, list[object]], per_group: int) -> Path:
    """Writes a Parquet file of small row groups."""
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=per_group)
    return path


def test_text_files_and_folders_are_records(tmp_path: Path) -> None:
    """Broken: a person's own text would be read in another order, changed, or left out."""
    texts = {"b.txt": "b\r\n", "a/c.txt": "\u00e9", "a/d.md": "no"}
    (tmp_path / "a").mkdir()
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text.encode())
    assert [r["text"] for r in text_source(tmp_path)] == ["\u00e9", "b\r\n"]
    both = text_source([tmp_path / "b.txt", tmp_path / "a" / "d.md"])
    assert both[1] == {"path": (tmp_path / "a" / "d.md").as_posix(), "text": "no"}
    assert [r["text"] for r in text_source(tmp_path, pattern="*/*.md")] == ["no"]


def test_json_lines_are_records(tmp_path: Path) -> None:
    """Broken: a line's text would be read from another line, or a blank line would be a record."""
    path = tmp_path / "data.jsonl"
    lines = ['{"body": "\u00e9\\n"}', "", '{"body": "two", "text": "other"}']
    path.write_bytes("\n".join(lines).encode())
    source = jsonl_source(path, "body")
    assert list(source) == [
        {"path": f"{path.as_posix()}:1", "text": "\u00e9\n"},
        {"path": f"{path.as_posix()}:3", "text": "two"},
    ]
    assert pickle.loads(pickle.dumps(source))[1]["text"] == "two"


@pytest.mark.parametrize("line", ["not json", '["text"]', '{"text": 1}', "{}"])
def test_a_bad_line_names_file_and_line(tmp_path: Path, line: str) -> None:
    """Broken: one bad line in a large file could not be found."""
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"text": "fine"}) + "\n" + line + "\n", encoding="utf-8")
    source = jsonl_source(path)
    assert source[0]["text"] == "fine"
    with pytest.raises(ValueError, match=r"data\.jsonl:2: expected"):
        source[1]


@pytest.mark.parametrize("make", [text_source, jsonl_source, parquet_source, array_record_source])
def test_missing_files_are_named(tmp_path: Path, make: Callable[[Path], object]) -> None:
    """Broken: a mistyped path would be an empty corpus."""
    with pytest.raises(FileNotFoundError, match="nowhere"):
        make(tmp_path / "nowhere")
    (tmp_path / "latin.txt").write_bytes(b"\xe9")
    with pytest.raises(ValueError, match=r"latin\.txt: expected utf-8 text, byte 0"):
        text_source(tmp_path / "latin.txt")[0]


def test_a_folder_of_json_lines_is_its_files_in_order(tmp_path: Path) -> None:
    """Broken: a corpus in several files would lose one, or give it the lines of another."""
    for name, texts in (("b", ["3"]), ("a", ["1", "2"]), ("c", [])):
        lines = [json.dumps({"text": text}) for text in texts]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    (tmp_path / "a.json").write_text("{}")
    source = jsonl_source(tmp_path)
    assert [r["text"] for r in source] == ["1", "2", "3"]
    assert source[2]["path"] == f"{(tmp_path / 'b.jsonl').as_posix()}:1"
    with pytest.raises(IndexError):
        source[3]


def test_parquet_rows_are_records(tmp_path: Path) -> None:
    """Broken: a row would come from another row group or file, or every column would be read."""
    write_parquet(tmp_path / "b.parquet", {"body": ["5"], "messages": [TALK]}, 1)
    columns = {"body": list("01234"), "messages": [TALK] * 5}
    first = write_parquet(tmp_path / "a.parquet", columns, 2)
    source = parquet_source(tmp_path, "body")
    assert [source[i]["text"] for i in (5, 0, 3, 2, 4, 1)] == list("503241")
    assert source[4]["path"] == f"{first.as_posix()}:4"
    assert parquet_source(first, "messages", "chat")[1]["messages"] == TALK
    with pytest.raises(InputError, match=r"unknown column of .*'bodi'.*nearest: body"):
        parquet_source(tmp_path, "bodi")
    with pytest.raises(InputError, match=r"a\.parquet:0: expected a string"):
        parquet_source(first, "messages")[0]
    first.write_bytes(first.read_bytes()[:-9])
    with pytest.raises(InputError, match=r"a\.parquet: not a complete Parquet file"):
        parquet_source(tmp_path, "body")


def test_parquet_without_pyarrow_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken: a missing package would end in a traceback."""
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(InputError, match=r"needs pyarrow: pip install 'gemma_qat\[parquet\]'"):
        parquet_source(tmp_path, "body")


def test_array_records_are_records(tmp_path: Path) -> None:
    """Broken: records would be read as something else, from another file, or in another order."""
    texts = ["one \u00e9", "two"]
    write_records(tmp_path / "t.array_record-00001-of-00002", [b"three"])
    write_records(tmp_path / "t.array_record-00000-of-00002", [text.encode() for text in texts])
    source = array_record_source(tmp_path)
    assert [r["text"] for r in source] == [*texts, "three"]
    assert source[2]["path"] == f"{tmp_path.as_posix()}:2"
    talk = write_records(tmp_path / "talk", [json.dumps({"messages": TALK}).encode(), b"no"])
    source = array_record_source(talk, "messages", "chat")
    assert source[0]["messages"] == TALK
    with pytest.raises(InputError, match="talk:1: expected one JSON object"):
        source[1]
    with pytest.raises(InputError, match="talk:1: expected an object with a string"):
        array_record_source(write_records(talk, [b"{}", b"{}"]), "body")[1]


def test_a_file_that_is_no_array_record_is_one_line(tmp_path: Path) -> None:
    """Broken: a wrong or truncated file would end in an error of the C++ reader."""
    path = write_records(tmp_path / "whole", [b"text"])
    for content in (b"plain", path.read_bytes()[:70_000]):
        (tmp_path / "cut").write_bytes(content)
        with pytest.raises(InputError, match="cut: not made of complete ArrayRecord files"):
            array_record_source(tmp_path / "cut")
