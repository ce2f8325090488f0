"""What a second look at an export finds, and what writing one must not destroy."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gemma_qat import api
from gemma_qat.checkpoint.native import save_model
from gemma_qat.cli.main import main
from gemma_qat.data import train_tokenizer
from gemma_qat.models import SIZES, fit, initialize

CONFIG = dataclasses.replace(
    SIZES["tiny_31b"], name="again", layer_kinds=("sliding", "full"), vocab_size=330, width=32, head_width=16,
    global_head_width=32, ffn_width=32, window=16,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs with a q4_0, a w4a16 and a float save, and a tokenizer."""
    where = tmp_path_factory.mktemp("again")
    parameters = initialize(CONFIG, 0)
    for recipe in ("q4_0", "w4a16"):
        save_model(where / recipe / "checkpoints/000001", parameters, fit(CONFIG, recipe), step=1)
    save_model(where / "float/checkpoints/000001", parameters, CONFIG, step=1)
    lines = [f"value_{i} = add({i}, {i * 7})\n" for i in range(200)]
    (where / "q4_0/beside").mkdir()
    text = (
        "def add(left, right):\n    return left + right\n\n\nclass Point:\n    x, y = 0, 10\n" * 8
    )
    train_tokenizer([text, "".join(lines)], 330, where / "q4_0/beside/tokenizer.model")
    (where / "q4_0/beside/chat_template.jinja").write_text("{{ x }}")
    return where


def said(capsys: pytest.CaptureFixture[str], status: int, *arguments: object) -> str:
    assert main([str(a) for a in arguments]) == status
    out, err = capsys.readouterr()
    line = err if status == 2 else out
    assert status != 2 or line.count("\n") == 1, line
    return line


def test_another_model_is_noticed(folder: Path, tmp_path: Path, capsys: Any) -> None:
    """If it fails, a file whose numbers are right and whose window or cap is not is called an equal export."""
    export = ["export", folder / "q4_0", "--format"]
    said(capsys, 0, *export, "gguf", "--out", tmp_path / "m.gguf")
    reader = gguf.GGUFReader(tmp_path / "m.gguf", "r+")
    reader.fields["gemma4.final_logit_softcapping"].parts[-1][0] = 5.0
    reader.data.flush()
    line = said(capsys, 2, *export, "gguf", "--out", tmp_path / "m.gguf", "--only-verify")
    assert "another model than the checkpoint's: logit_softcap is 5.0, 30.0 expected" in line
    for format in ("huggingface", "compressed-tensors"):
        said(capsys, 0, *export, format, "--out", tmp_path / format)
        config = json.loads((tmp_path / format / "config.json").read_text())
        (tmp_path / format / "config.json").write_text(json.dumps(config | {"sliding_window": 3}))
        line = said(capsys, 2, *export, format, "--out", tmp_path / format, "--only-verify")
        assert "window is 3, 16 expected" in line


def test_an_export_of_another_checkpoint_is_one_line(
    folder: Path, tmp_path: Path, capsys: Any
) -> None:
    """If it fails, comparing with the wrong file ends in a traceback."""
    said(capsys, 0, "export", folder / "q4_0", "--format", "gguf", "--out", tmp_path / "q.gguf")
    other = ["export", folder / "float", "--format", "gguf", "--out", tmp_path / "q.gguf"]
    line = said(capsys, 2, *other, "--only-verify")
    assert "q.gguf: not an export of this checkpoint (" in line


def test_a_tensor_that_nothing_of_ours_is_made_of_has_a_digest(
    folder: Path, tmp_path: Path, capsys: Any
) -> None:
    """If it fails, a flipped bit in a carried tower is called equal."""
    export = ["export", folder / "q4_0", "--format", "huggingface", "--out", tmp_path / "hf"]
    said(capsys, 0, *export)
    tensors = load_file(tmp_path / "hf/model.safetensors")
    save_file(
        tensors | {"model.vision_tower.x": np.zeros(3, np.float32)},
        tmp_path / "hf/model.safetensors",
    )
    assert "1 files changed since they were written" in said(capsys, 1, *export, "--only-verify")


def test_a_gguf_gives_back_its_tokenizer(folder: Path, tmp_path: Path, capsys: Any) -> None:
    """If it fails, a file that came in as GGUF goes out without a vocabulary, and nobody says so."""
    gguf_of = ["export", folder / "q4_0", "--format", "gguf", "--out", tmp_path / "a.gguf"]
    assert "no tokenizer" not in said(capsys, 0, *gguf_of)
    said(capsys, 0, "convert", tmp_path / "a.gguf", "--out", tmp_path / "in")
    said(capsys, 0, "export", tmp_path / "in", "--format", "gguf", "--out", tmp_path / "b.gguf")
    fields = [gguf.GGUFReader(tmp_path / name).fields for name in ("a.gguf", "b.gguf")]
    names = [name for name in fields[0] if name.startswith("tokenizer.")]
    assert len(names) > 8 and "tokenizer.chat_template" in names
    for name in names:
        assert fields[1][name].contents() == fields[0][name].contents(), name
    bare = ["export", folder / "w4a16", "--format", "gguf", "--out", tmp_path / "c.gguf"]
    assert "no tokenizer lies beside it" in said(capsys, 0, *bare)


def test_what_is_read_is_not_written_over(folder: Path, tmp_path: Path, capsys: Any) -> None:
    """If it fails, a training save, a float model or a stranger's file is gone after a slip of the hand."""
    save = folder / "q4_0/checkpoints/000001"
    for out, format in (
        (save, "native"),
        (save / "manifest.json", "gguf"),
    ):
        line = said(capsys, 2, "export", folder / "q4_0", "--format", format, "--out", out)
        assert "is, or is part of, what is read" in line
    api.export(folder / "q4_0", format="huggingface", out=tmp_path / "hf")
    line = said(capsys, 2, "ptq", tmp_path / "hf", "--recipe", "q4_0", "--out", tmp_path / "hf")
    assert "is, or is part of, what is read" in line
    (tmp_path / "notes.txt").write_text("mine")
    line = said(
        capsys, 2, "export", folder / "q4_0", "--format", "gguf", "--out", tmp_path / "notes.txt"
    )
    assert (
        "no GGUF, which is not replaced" in line and (tmp_path / "notes.txt").read_text() == "mine"
    )


def test_what_the_system_refuses_is_one_line(folder: Path, tmp_path: Path, capsys: Any) -> None:
    """If it fails, a full disk, a file in the way or a name too long is a traceback."""
    (tmp_path / "file").write_text("x")
    export = ["export", folder / "q4_0", "--format"]
    assert "file" in said(capsys, 2, *export, "gguf", "--out", tmp_path / "file/m.gguf")
    assert "too long" in said(capsys, 2, *export, "gguf", "--out", tmp_path / ("n" * 250 + ".gguf"))
    (folder / "q4_0/beside/chat_template.jinja").write_bytes(b"\xff\xfe")
    try:
        assert "not UTF-8" in said(capsys, 2, *export, "gguf", "--out", tmp_path / "m.gguf")
    finally:
        (folder / "q4_0/beside/chat_template.jinja").write_text("{{ x }}")
    assert not (tmp_path / "m.gguf").exists()
