"""From a data config to training rows: every kind of source, alone and together."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from gemma_qat.config import BlendConfig, DataConfig, ExperimentConfig
from gemma_qat.data import (
    KINDS,
    SYMBOLS,
    Blend,
    Document,
    Kind,
    Tokenizer,
    collect,
    make_loader,
    split_of,
    train_tokenizer,
    write_source,
)
from gemma_qat.data.files import training_rows
from gemma_qat.errors import InputError
from gemma_qat.ptq import CalibrationConfig
from gemma_qat.training import _calibration_batches

TEXTS = [f"document {i}: " + "the left and the right of a point\n" * (i % 4) for i in range(9)]
MESSAGES = [
    [{"role": "user", "content": f"left {i}?"}, {"role": "model", "content": f"right {i}"}]
    for i in range(9)
]
Calls = list[tuple[str, int, int]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with turns, as a file."""
    path = tmp_path_factory.mktemp("model") / "chat.model"
    train_tokenizer([*TEXTS, "left right user model"], 320, path, SYMBOLS)
    return path


def write_text(path: Path) -> None:
    for number, text in enumerate(TEXTS):
        (path / f"{number}.txt").write_text(text)


def write_jsonl(path: Path) -> None:
    lines = [json.dumps({"text": t, "messages": m}) for t, m in zip(TEXTS, MESSAGES, strict=True)]
    (path / "a.jsonl").write_text("\n".join(lines))


def write_parquet(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": TEXTS, "messages": MESSAGES})
    pyarrow.parquet.write_table(table, path / "a.parquet")


def write_array_record(path: Path) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path / "a.array_record"), "group_size:1")
    for text in TEXTS:
        writer.write(text.encode())
    writer.close()


def write_tfds(path: Path) -> None:
    write_source({"train": [Document(path=str(i), text=t) for i, t in enumerate(TEXTS)]}, path)


WRITERS: dict[str, Callable[[Path], None]] = {
    "text": write_text, "jsonl": write_jsonl, "parquet": write_parquet,
    "array_record": write_array_record, "tfds": write_tfds,
}  # fmt: skip


def written(kind: str, path: Path) -> str:
    """The folder of a small corpus of a kind."""
    path.mkdir()
    WRITERS[kind](path)
    return str(path)


def said(rows: Blend, tokenizer: Tokenizer) -> list[str]:
    """The texts that some rows hold, sorted."""
    every = rows[np.arange(len(rows))]
    real = every.segments > 0
    order = np.lexsort((np.arange(real.sum()), every.documents[real]))
    tokens, owners = every.tokens[real][order], every.documents[real][order]
    return sorted(tokenizer.decode(tokens[owners == owner].tolist()) for owner in np.unique(owners))


def test_a_tokenizer_of_another_size_is_refused_first(model: Path, tmp_path: Path) -> None:
    """Broken: hours of tokenizing would pass before a run says that its model cannot read the ids."""
    data = DataConfig(kind="jsonl", path=written("jsonl", tmp_path / "data"), tokenizer=str(model))
    with pytest.raises(InputError, match="tokenizer has 320 pieces, the model a vocabulary of 99"):
        training_rows(data, tmp_path / "rows", vocab_size=99)
    assert not (tmp_path / "rows").exists()
    assert len(training_rows(data, tmp_path / "rows", vocab_size=320)) > 0


def test_every_kind_is_in_the_table() -> None:
    """Broken: a config could name a kind that nothing opens."""
    assert set(get_args(Kind)) == set(KINDS) == {*WRITERS, "stdlib"}


@pytest.mark.parametrize("kind", WRITERS)
def test_every_kind_gives_its_documents(kind: str, model: Path, tmp_path: Path) -> None:
    """Broken: a corpus in one format would be trained on otherwise than in another."""
    calls: Calls = []
    path = written(kind, tmp_path / kind)
    data = DataConfig(kind=kind, path=path, tokenizer=str(model), length=128)
    rows = training_rows(data, tmp_path / "rows", lambda *call: calls.append(call))
    tokenizer = Tokenizer.load(model)
    assert said(rows, tokenizer) == sorted(TEXTS)
    (full,) = [call for call in calls if call[0].startswith("rows of")]
    used = float(np.mean(rows[np.arange(len(rows))].segments > 0))
    assert full == (f"rows of {kind}, {used:.2%} full", len(rows), len(rows))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_conversations_are_a_format_of_any_kind(kind: str, model: Path, tmp_path: Path) -> None:
    """Broken: conversations would be learned whole, or only from one format of file."""
    path = written(kind, tmp_path / kind)
    data = DataConfig(kind=kind, path=path, format="chat", tokenizer=str(model), length=64)
    rows = training_rows(data, tmp_path / "rows")
    tokenizer = Tokenizer.load(model)
    batch = next(make_loader(rows, batch_size=len(rows), seed=0))
    learned = tokenizer.decode(batch["targets"][batch["weights"] > 0].tolist())
    answers = [answer for answer in learned.split("<turn|>") if answer]
    assert sorted(answers) == sorted(f"right {i}" for i in range(9))
    assert said(rows, tokenizer)[0].startswith("<|turn>user\nleft 0?<turn|>\n<|turn>model\nright 0")


def test_rows_are_made_once(model: Path, tmp_path: Path) -> None:
    """Broken: every start would tokenize the corpus again, or train on rows of an older one."""
    path = written("jsonl", tmp_path / "data")
    data = DataConfig(kind="jsonl", path=path, tokenizer=str(model), length=32)

    def made(data: DataConfig) -> tuple[list[str], Blend]:
        calls: Calls = []
        rows = training_rows(data, tmp_path / "rows", lambda *call: calls.append(call))
        return [call[0] for call in calls if call[0] == "tokenize"], rows

    assert made(data)[0] == ["tokenize"]
    again, rows = made(data)
    assert again == []
    first = rows.parts[0].digest
    assert made(dataclasses.replace(data, length=16))[0] == ["tokenize"]
    file = Path(path, "a.jsonl")
    os.utime(file, ns=(1, 1))
    again, rows = made(data)
    assert again == ["tokenize"], "another time may be another text"
    assert rows.parts[0].digest == first, "but the same text is the same rows"
    file.write_text(file.read_text().replace("left", "LEFT"))
    assert made(data)[1].parts[0].digest != first
    elsewhere = dataclasses.replace(data, cache=str(tmp_path / "cache"))
    assert made(elsewhere)[0] == ["tokenize"] and (tmp_path / "cache").is_dir()


def test_rows_that_go_on_begin_with_bos(model: Path, tmp_path: Path) -> None:
    """Broken: training rows would begin otherwise than held-out rows, or rows of one kind be taken for the other's."""
    path = written("jsonl", tmp_path / "data")
    data = DataConfig(kind="jsonl", path=path, tokenizer=str(model), length=16)
    bare = dataclasses.replace(data, bos_in_every_piece=False)
    tokenizer = Tokenizer.load(model)

    def begun(data: DataConfig) -> np.ndarray:
        rows = training_rows(data, tmp_path / "rows")[np.arange(4)]
        return rows.tokens[(rows.positions == 0) & (rows.segments > 0)] == tokenizer.bos_id

    assert data.bos_in_every_piece and begun(data).all()
    assert not begun(bare).all()
    assert begun(data).all(), "two kinds of rows in one folder"
    assert said(training_rows(data, tmp_path / "rows"), tokenizer) == sorted(TEXTS)
    talks = dataclasses.replace(data, format="chat")
    folders = {p.name for p in (tmp_path / "rows").iterdir()}
    training_rows(talks, tmp_path / "rows")
    training_rows(dataclasses.replace(talks, bos_in_every_piece=False), tmp_path / "rows")
    assert len({p.name for p in (tmp_path / "rows").iterdir()} - folders) == 1, "made twice"


def test_calibration_text_is_a_named_part_of_the_data(model: Path, tmp_path: Path) -> None:
    """Broken: static scales would be found on other text than a config says."""
    parts = {"train": TEXTS[:5], "validation": TEXTS[5:]}
    write_source(
        {name: [Document(path=f"{name}{i}", text=t) for i, t in enumerate(part)] for name, part in parts.items()},
        tmp_path / "data",
    )  # fmt: skip
    data = DataConfig(kind="tfds", path=str(tmp_path / "data"), tokenizer=str(model), length=128)
    config = ExperimentConfig(name="", model="tiny_e2b", data=data, directory=str(tmp_path))
    tokenizer = Tokenizer.load(model)
    rows = training_rows(data, tmp_path / "rows")

    def text(split: str, config: ExperimentConfig = config) -> str:
        how = CalibrationConfig(split=split, batch_size=64)
        batches = _calibration_batches(dataclasses.replace(config, calibration=how), rows)
        return tokenizer.decode(next(iter(batches))["tokens"].ravel().tolist())

    for split, part in parts.items():
        assert [one in text(split) for one in TEXTS] == [one in part for one in TEXTS]
    with pytest.raises(InputError, match="nothing"):
        text("nothing")
    other = dataclasses.replace(config, data=dataclasses.replace(data, kind="text"))
    with pytest.raises(InputError, match="calibration.split=validation: data of kind text has no"):
        text("validation", other)


def test_a_blend_of_kinds_and_formats(model: Path, tmp_path: Path) -> None:
    """Broken: pretraining text and conversations could not be trained on together."""
    first, second = (written("jsonl", tmp_path / name) for name in ("a", "b"))
    talks = BlendConfig(kind="jsonl", path=second, format="chat", weight=0.5)
    data = DataConfig(kind="jsonl", path=first, tokenizer=str(model), length=16, blend=(talks,))
    rows = training_rows(data, tmp_path / "rows")
    texts, conversations = rows.parts
    assert rows.weights == (1.0, 0.5)
    loader = make_loader(rows, batch_size=3, seed=0)
    for _ in range(6):
        batch = next(loader)
        assert (batch["ids"] >= len(texts)).sum() == 1
        np.testing.assert_array_equal(batch["tokens"], rows[batch["ids"]].tokens)
    assert conversations[np.arange(2)].learn.min() == 0


def test_long_conversations_are_counted(model: Path, tmp_path: Path) -> None:
    """Broken: what was left out of training would not be said."""
    calls: Calls = []
    path = written("jsonl", tmp_path / "data")
    data = DataConfig(kind="jsonl", path=path, format="chat", tokenizer=str(model), length=8)
    training_rows(data, tmp_path / "rows", lambda *call: calls.append(call))
    assert calls[-1][0].endswith("tokens too many")


def test_the_standard_library_needs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken: the smallest run would need files, or would train on what is held out."""
    some = [d for i, d in enumerate(collect()) if i % 9 == 0 or split_of(d.path) != "train"]
    monkeypatch.setattr("gemma_qat.data.prepare.collect", lambda: some)
    data = DataConfig(path=str(tmp_path / "data"), vocab_size=400, length=512)
    rows = training_rows(data, tmp_path / "rows")
    train = [d.text for d in some if split_of(d.path) == "train"]
    assert said(rows, Tokenizer.load(tmp_path / "data" / "tokenizer.model")) == sorted(train)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kind": "jsonl", "path": "x"}, "data.kind=jsonl needs data.tokenizer"),
        (
            {"kind": "text", "format": "chat"},
            "data.format=chat needs conversations, data.kind=text",
        ),
        ({"kind": "jsonl", "path": "nowhere"}, "JSON-lines source nowhere: expected a file"),
    ],
)
def test_a_config_that_cannot_be_is_one_line(
    given: dict[str, Any], message: str, model: Path, tmp_path: Path
) -> None:
    """Broken: a wrong data config would end in a traceback."""
    tokenizer = {} if "needs data.tokenizer" in message else {"tokenizer": str(model)}
    with pytest.raises((InputError, FileNotFoundError), match=message):
        training_rows(DataConfig(**given, **tokenizer), tmp_path)
