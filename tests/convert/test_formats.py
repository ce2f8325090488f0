"""What is recognised: if these fail, a checkpoint is taken for something else, or a pickle is opened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import pytest

from gemma_qat.convert import FORMATS, convert, format_of, open_source
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


def test_our_own_checkpoints_are_not_foreign(hugging_face: Make, tmp_path: Path) -> None:
    """Their arrays are Orbax trees too."""
    for name in ("a", "b"):
        convert(hugging_face("tiny_12b").write(), tmp_path / "runs" / name)
    with pytest.raises(InputError, match="already, nothing to convert"):
        format_of(tmp_path / "runs" / "a")
    with pytest.raises(InputError, match="no checkpoint that is known"):
        format_of(tmp_path / "runs")


def test_a_deepmind_tree(tmp_path: Path) -> None:
    """Known by its embedding, in a directory beside its tokenizer; other trees are not."""
    table = {"input_embedding": np.zeros((3, 2), np.float32)}
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save((tmp_path / "kaggle" / "tree").absolute(), {"embedder": table})
        checkpointer.save((tmp_path / "other" / "tree").absolute(), {"encoder": table})
    assert format_of(tmp_path / "kaggle").name == "orbax"
    assert format_of(tmp_path / "kaggle" / "tree").name == "orbax"
    with pytest.raises(InputError, match="no checkpoint that is known"):
        format_of(tmp_path / "other")
    with pytest.raises(InputError, match="no size fits"), open_source(tmp_path / "kaggle"):
        pass


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
