"""TFDS datasets as random-access records: ours, and anybody's."""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gemma_qat.data import Document, open_source, tfds_source, write_source
from gemma_qat.errors import InputError

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

    monkeypatch.setattr("gemma_qat.data.datasets._write_card", fail)
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


def foreign(folder: Path, name: str, file_format: str = "array_record") -> Path:
    """A dataset of somebody else's: other features, two shards, no card of ours."""
    import tensorflow_datasets as tfds

    turns = tfds.features.Sequence({"role": tfds.features.Text(), "content": tfds.features.Text()})

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        VERSION = tfds.core.Version("2.3.4")
        url_infos = None

        def _info(self) -> tfds.core.DatasetInfo:
            features = {"id": np.int64, "body": tfds.features.Text(), "messages": turns}
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
            )

        def _split_generators(self, dl_manager: object) -> dict[str, object]:
            return {"validation": self._generate_examples()}

        def _generate_examples(self) -> Iterator[tuple[int, dict[str, object]]]:
            for i in range(10):
                say = [{"role": "user", "content": f"{i}?"}, {"role": "model", "content": "\u00e9"}]
                yield i, {"id": i, "body": f"document {i} \u00e9", "messages": say}

    Builder.name = name
    config = tfds.download.DownloadConfig(
        try_download_gcs=False, compute_stats=tfds.download.ComputeStatsMode.SKIP, num_shards=2
    )
    builder = Builder(data_dir=str(folder), file_format=file_format)
    builder.download_and_prepare(download_dir=str(folder / "downloads"), download_config=config)
    return folder


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A foreign dataset in array_record below `one`."""
    return foreign(tmp_path_factory.mktemp("tfds") / "one", "theirs")


def test_anybodys_dataset_is_read(datasets: Path) -> None:
    """Broken: only datasets of this project could be trained on, or a record would be another's."""
    exact = datasets / "theirs" / "2.3.4"
    source = tfds_source(datasets, "body", split="validation")
    assert [r["text"] for r in source] == [f"document {i} \u00e9" for i in range(10)]
    assert source[7]["path"] == "validation:7"
    part = tfds_source(exact, "body", split="validation[80%:]")
    assert [r["text"] for r in part] == ["document 8 \u00e9", "document 9 \u00e9"]


def test_a_sequence_of_features_is_a_conversation(datasets: Path) -> None:
    """Broken: TFDS keeps messages column by column, and a conversation would lose its turns."""
    source = tfds_source(datasets, "messages", "chat", "validation")
    assert source[3]["messages"] == [
        {"role": "user", "content": "3?"},
        {"role": "model", "content": "\u00e9"},
    ]


@pytest.mark.parametrize(
    ("field", "split", "message"),
    [
        ("body", "valid", "unknown split of .*'valid'.*nearest: validation"),
        ("text", "validation", "unknown feature of .*'text'.*body"),
        ("id", "validation", "validation:0: expected an object with a string under 'id'"),
    ],
)
def test_a_wrong_name_in_a_dataset_is_one_line(
    datasets: Path, field: str, split: str, message: str
) -> None:
    """Broken: a mistyped split or feature would end in a traceback from inside TFDS."""
    with pytest.raises(InputError, match=message):
        tfds_source(datasets, field, split=split)[0]


def test_a_dataset_has_to_be_found_and_in_array_record(datasets: Path, tmp_path: Path) -> None:
    """Broken: a folder without a dataset, with two, or of TFRecords would fail inside TFDS."""
    with pytest.raises(FileNotFoundError, match=r"dataset_info\.json"):
        tfds_source(tmp_path)
    for version in ("2.3.4", "2.3.5"):
        shutil.copytree(datasets / "theirs" / "2.3.4", tmp_path / "theirs" / version)
    with pytest.raises(InputError, match=r"several datasets, name one of theirs.2\.3\.4, theirs"):
        tfds_source(tmp_path)
    info = tmp_path / "theirs" / "2.3.5" / "dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(InputError, match="written as tfrecord, array_record expected"):
        tfds_source(info.parent, "body", split="validation")
