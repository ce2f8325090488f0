"""Exports of the hub through the command line: written, verified, measured, refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gemma_qat import load
from gemma_qat.checkpoint.native import load_parameters, save_model
from gemma_qat.cli.main import main
from gemma_qat.data import train_tokenizer
from gemma_qat.models import SIZES, fit, initialize

CONFIG = dataclasses.replace(
    SIZES["tiny_31b"], name="cli", layer_kinds=("full",), vocab_size=330, width=32, head_width=16,
    global_head_width=32, ffn_width=32, window=16,
)  # fmt: skip
TEXT = "def add(left, right):\n    return left + right\n\n\nclass Point:\n    x, y = 0, 10\n" * 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one QAT checkpoint, a tokenizer and two texts."""
    where = tmp_path_factory.mktemp("export")
    parameters = initialize(CONFIG, 0)
    save_model(where / "run/checkpoints/000007", parameters, fit(CONFIG, "w4a16"), step=7)
    (where / "run/config.json").write_text('{"name": "mine"}')
    (where / "files").mkdir()
    (where / "files/tokenizer.json").write_text("{}")
    for name in ("a.py", "b.py"):
        (where / name).write_text(TEXT)
    lines = [f"value_{i} = add({i}, {i * 7})\n" for i in range(200)]
    train_tokenizer([TEXT, "".join(lines)], 330, where / "t.model")
    return where


def _out(capsys: pytest.CaptureFixture[str], status: int, *arguments: object) -> str:
    assert main([str(a) for a in arguments]) == status
    shown = capsys.readouterr()
    return shown.out if status != 2 else shown.err


def test_export_verify_and_text(folder: Path, tmp_path: Path, capsys) -> None:
    """If it fails, --verify measures something else than the file, or misses what differs."""
    export = [
        "export", folder / "run", "--format", "compressed-tensors", "--out", tmp_path / "ct",
        "--tokenizer", folder / "t.model",
    ]  # fmt: skip
    texts = ["--text", folder / "a.py", folder / "b.py"]
    out = _out(capsys, 0, *export, "--verify", *texts)
    assert "differing codes 0, differing scales 0, differing floats 0" in out
    assert "top-1 agreement 100.00%" in out and "bits per weight" in out
    facts = json.loads((tmp_path / "ct/gemma_qat.json").read_text())
    assert facts["source"]["step"] == 7 and facts["source"]["run"] == {"name": "mine"}
    tensors = load_file(tmp_path / "ct/model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight_packed"][3, 1] ^= 1 << 9
    save_file(tensors, tmp_path / "ct/model.safetensors")
    assert "differing codes 1," in _out(capsys, 1, *export, "--only-verify")


def test_export_float(folder: Path, tmp_path: Path, capsys) -> None:
    """If it fails, values and masters are taken for one another, or a float file is not the model."""
    export = ["export", folder / "run", "--format", "huggingface"]
    out = _out(capsys, 0, *export, "--out", tmp_path / "values", "--verify")
    assert "a quantizer that derives scales" in out
    _out(capsys, 0, *export, "--out", tmp_path / "masters", "--masters")
    name = "layers/0/ffn/up/kernel"
    masters = load_parameters(folder / "run/checkpoints/000007")[1]
    found = load(tmp_path / "masters").parameters()[name]
    assert np.array_equal(found, masters[name])
    values = load(tmp_path / "values").parameters()[name]
    assert not np.array_equal(values, masters[name])


def test_export_refuses(folder: Path, tmp_path: Path, capsys) -> None:
    """If it fails, bad input ends in a traceback, or is taken for something else."""
    export = ["export", folder / "run", "--out", tmp_path / "out"]
    report = tmp_path / "report.json"
    report.write_text("[]")
    (tmp_path / "empty").mkdir()
    for more, said in (
        (["--format", "mobile"], "in tiles of 32"),
        (["--format", "gguf", "--dtype", "bfloat16"], "takes no dtype"),
        (["--format", "huggingface", "--dtype", "int8"], "unknown dtype"),
        (["--format", "compressed-tensors", "--tables", "some"], "unknown form of tables"),
        (["--format", "gguf", "--files", folder / "files"], "takes no dtype, tables, files"),
        (["--format", "native", "--files", folder / "files"], "takes no dtype, tables, files"),
        (["--format", "huggingface", "--files", tmp_path / "nowhere"], "no such directory"),
        (["--format", "huggingface", "--files", tmp_path / "empty"], "no tokenizer, chat template"),
        (["--format", "huggingface", "--report", report], "not a report.json"),
        (
            ["--format", "huggingface", "--text", folder / "a.py"],
            "--text is about what --verify finds",
        ),
        (["--format", "huggingface", "--verify", "--text", folder / "a.py"], "no tokenizer lies"),
        (["--format", "huggingface", "--only-verify"], "no such file"),
        (["--format", "safetensors"], "unknown export format"),
    ):
        line = _out(capsys, 2, *export, *more)
        assert said in line and line.count("\n") == 1, line
        assert not (tmp_path / "out").exists()
