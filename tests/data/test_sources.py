"""Datasets on disk and text files as random-access records."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from gemma_qat.data import Document, jsonl_source, open_source, text_source, write_source

Splits = dict[str, list[Document]]


def modified(directory: Path) -> dict[str, int]:
    """The files below a folder with the time each was written."""
    files = [file for file in directory.rglob("*") if file.is_file()]
    return {file.relative_to(directory).as_posix(): file.stat().st_mtime_ns for file in files}


def test_what_is_written_is_read_back(tmp_path: Path, documents_by_split: Splits) -> None:
    """Broken: training text would differ from the corpus, or record i would not be document i."""
    directory = write_source(documents_by_split, tmp_path / "deep" / "source")
    for split, documents in documents_by_split.items():
        source = open_source(directory, split)
        assert len(source) == len(documents)
        assert list(source) == [{"path": d.path, "text": d.text} for d in documents]
        assert source[1] == {"path": documents[1].path, "text": documents[1].text}
        assert pickle.loads(pickle.dumps(source))[1] == source[1]
    assert [path.name for path in directory.parent.iterdir()] == ["source"]


def test_the_files_are_a_tfds_array_record_dataset(
    tmp_path: Path, documents_by_split: Splits
) -> None:
    """Broken: other programs could not read the dataset with TFDS alone."""
    import tensorflow_datasets as tfds

    write_source(documents_by_split, tmp_path / "source", name="other_name")
    builder = tfds.builder_from_directory(str(tmp_path / "source" / "other_name" / "1.0.0"))
    assert builder.info.splits["test"].num_examples == 2
    assert builder.info.file_format is not None
    assert builder.info.file_format.value == "array_record"


def test_equal_documents_keep_the_dataset(tmp_path: Path, documents_by_split: Splits) -> None:
    """Broken: every start of a run would write the corpus again."""
    directory = write_source(documents_by_split, tmp_path / "source")
    before = modified(directory)
    write_source(documents_by_split, directory)
    assert modified(directory) == before


@pytest.mark.parametrize("change", ["text", "path", "split", "truncated", "card"])
def test_a_difference_replaces_the_dataset(
    tmp_path: Path, documents_by_split: Splits, change: str
) -> None:
    """Broken: a run would silently train on the old text, the old split or a damaged file."""
    directory = write_source(documents_by_split, tmp_path / "source")
    train, test = documents_by_split["train"], documents_by_split["test"]
    if change == "text":
        train = [replace(train[0], text=train[0].text + " "), *train[1:]]
    elif change == "path":
        train = [replace(train[0], path="renamed.py"), *train[1:]]
    elif change == "split":
        train, test = [test[0], *train[1:]], [train[0], *test[1:]]
    elif change == "truncated":
        next(directory.rglob("*train*")).write_bytes(b"")
    else:
        (directory / "source.json").write_text("{", encoding="utf-8")
    write_source({"train": train, "test": test}, directory)
    for split, documents in (("train", train), ("test", test)):
        expected = [{"path": d.path, "text": d.text} for d in documents]
        assert list(open_source(directory, split)) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_failed_write_leaves_the_old_dataset(
    tmp_path: Path, documents_by_split: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken: an interrupted write would leave half a dataset, or none, under the final name."""
    directory = write_source(documents_by_split, tmp_path / "source")
    before = modified(directory)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("gemma_qat.data.sources._write_card", fail)
    with pytest.raises(OSError, match="disk full"):
        write_source({"train": documents_by_split["test"]}, directory)
    assert modified(directory) == before
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_folder_of_something_else_is_not_replaced(
    tmp_path: Path, documents_by_split: Splits
) -> None:
    """Broken: a mistyped directory would lose a person's files."""
    (tmp_path / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match="holds something else"):
        write_source(documents_by_split, tmp_path)
    assert (tmp_path / "mine.txt").read_text(encoding="utf-8") == "mine"


def test_nothing_to_write_is_an_error(tmp_path: Path, documents_by_split: Splits) -> None:
    """Broken: an empty split would be found out in the middle of a run."""
    with pytest.raises(ValueError, match=r"no documents in split validation$"):
        write_source({**documents_by_split, "validation": []}, tmp_path / "source")
    with pytest.raises(ValueError, match="none given"):
        write_source({}, tmp_path / "source")
    assert not (tmp_path / "source").exists()


def test_a_missing_dataset_is_one_line(tmp_path: Path, documents_by_split: Splits) -> None:
    """Broken: a wrong directory or split would end in a traceback from inside TFDS."""
    with pytest.raises(FileNotFoundError, match=r"^no dataset in [^\n]*nowhere: [^\n]*$"):
        open_source(tmp_path / "nowhere", "train")
    directory = write_source(documents_by_split, tmp_path / "source")
    with pytest.raises(ValueError, match=r"'tset'.*nearest: test"):
        open_source(directory, "tset")
    next(directory.rglob("*train*")).unlink()
    with pytest.raises(FileNotFoundError, match="no dataset in"):
        open_source(directory, "train")


def test_writing_is_quiet_and_needs_no_tensorflow(tmp_path: Path) -> None:
    """Broken: a run would start with TFDS's banners, look for the network, or need TensorFlow."""
    script = (
        "import pathlib, socket, sys, warnings; warnings.simplefilter('error')\n"
        "from gemma_qat.data import Document, open_source, write_source\n"
        "def refuse(*a, **k): raise AssertionError('network')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "assert not {'tensorflow_datasets', 'grain', 'sentencepiece'} & set(sys.modules)\n"
        "where = pathlib.Path(sys.argv[1])\n"
        "write_source({'train': [Document(path='a', text='b')]}, where)\n"
        "assert open_source(where, 'train')[0] == {'path': 'a', 'text': 'b'}\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "source")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


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
    source = jsonl_source(path, field="body")
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


@pytest.mark.parametrize("make", [text_source, jsonl_source])
def test_missing_files_are_named(tmp_path: Path, make: Callable[[Path], object]) -> None:
    """Broken: a mistyped path would be an empty corpus."""
    with pytest.raises(FileNotFoundError, match="nowhere"):
        make(tmp_path / "nowhere")
    (tmp_path / "latin.txt").write_bytes(b"\xe9")
    with pytest.raises(ValueError, match=r"latin\.txt: expected utf-8 text, byte 0"):
        text_source(tmp_path / "latin.txt")[0]
