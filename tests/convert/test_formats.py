"""What is recognised: if these fail, a checkpoint is taken for something else, or a pickle is opened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemma_qat.convert import FORMATS, format_of, open_source
from gemma_qat.errors import InputError

Make = Callable[..., Any]


def test_names_are_used_once() -> None:
    assert len({row.name for row in FORMATS}) == len(FORMATS)


def test_a_hugging_face_directory(hugging_face: Make) -> None:
    directory = hugging_face("tiny_12b").write(2)
    assert format_of(directory).name == "safetensors"
    with open_source(directory) as source:
        assert source.format == "safetensors"


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt", "x.pkl"]
)
def test_pickles_are_refused(name: str, hugging_face: Make) -> None:
    """As a file and as all there is in a directory, without being opened."""
    directory = hugging_face("tiny_12b").write()
    (directory / "model.safetensors").rename(directory / name)
    for path in (directory, directory / name):
        with pytest.raises(InputError, match="pickle files are never read"):
            format_of(path)


def test_a_quantization_that_is_not_known(hugging_face: Make) -> None:
    made = hugging_face("tiny_12b")
    made.json["quantization_config"] = {"quant_method": "gptq"}
    with pytest.raises(InputError, match="quant_method gptq is not one that is read"):
        format_of(made.write())


def test_what_nobody_knows(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        format_of(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("nothing")
    for path in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(
            InputError, match=r"expected one of: .*Hugging Face directory.*Orbax tree"
        ):
            format_of(path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"no model.safetensors"):
        format_of(tmp_path)
