"""What a person is shown of a checkpoint: if these fail, it is another one than lies there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma_qat.checkpoint.native import load_parameters, save_model
from gemma_qat.cli.main import main
from gemma_qat.convert.parts import digest
from gemma_qat.models import SIZES, declare, initialize

Show = Callable[..., str]
VISION = "model.vision_tower.patch.weight"


@pytest.fixture
def show(capsys: pytest.CaptureFixture[str]) -> Show:
    def run(*arguments: object) -> str:
        capsys.readouterr()
        assert main([str(a) for a in arguments]) == 0
        return capsys.readouterr().out

    return run


def _bits(shown: str) -> set[tuple[str, str]]:
    """(format, bits per weight) of the rows of the table."""
    rows = [line.split("\u2502") for line in shown.splitlines() if line.startswith("\u2502")]
    return {(row[2].strip(), row[3].strip()) for row in rows}


def test_floats_are_shown_as_they_are_stored(
    hugging_face: Any, bfloat16: Any, tmp_path: Path, show: Show
) -> None:
    """If it fails, a table says float16 of float32, or counts half its bytes; here and after conversion."""
    made = hugging_face("tiny_12b", dtype=bfloat16)
    whole = sum(x.nbytes for x in made.parameters.values())
    name = "model.embed_tokens.weight"
    made.tensors[name] = made.tensors[name].astype(np.float32)
    total = f"total {whole + made.tensors[name].nbytes // 2:,} bytes"
    directory = made.write()
    show("convert", directory, "--out", tmp_path / "native")
    for source in (directory, tmp_path / "native"):
        shown = show("inspect", source)
        assert _bits(shown) == {("bfloat16", "16.000"), ("float32", "32.000")} and total in shown
    # What a recipe would make of it is another thing than what is stored.
    assert total not in show("inspect", directory, "--recipe", "q4_0")


def test_a_converted_checkpoint_says_where_it_came_from(
    hugging_face: Any, tmp_path: Path, show: Show
) -> None:
    """If it fails, nobody sees what was left out of a conversion, or that towers travel with it."""
    made = hugging_face("tiny_31b", prefix="model.language_model.")
    made.tensors[VISION] = np.zeros((2, 2), np.float32)
    made.tensors["lm_head.weight"] = np.zeros((64, made.config.width), np.float32)
    directory = made.write()
    for carry in ("--carry", "--no-carry"):
        out = tmp_path / carry
        show("convert", directory, "--out", out, carry)
        shown = show("inspect", out, "--digests").splitlines()
        assert "kind float, recipe none (float)" in shown and "converted from safetensors" in shown
        travels = f"travels with it: 1 tensors (vision), first {VISION}, in carried.safetensors"
        assert (travels in shown) == (carry == "--carry")
        assert (f"left out: 1 tensors (vision), first {VISION}" in shown) != (carry == "--carry")
        said = "left out: 1 tensors (head beside a tied embedding, which is read in its place), first lm_head.weight"
        assert said in shown and "beside: config.json" in shown
        assert "SHA-256 of the arrays as they were converted from safetensors:" in shown
        path = "layers/0/ffn/up/kernel"
        assert f"{digest(made.parameters[path])}  {path}" in shown


def test_a_checkpoint_of_a_run(tmp_path: Path, show: Show) -> None:
    """If it fails, --digests speaks of converting, or its digests are not those of the arrays."""
    config = dataclasses.replace(
        SIZES["tiny_31b"], name="small", layer_kinds=("full",), vocab_size=64
    )
    save_model(tmp_path / "float", initialize(config, 0), config, step=5)
    shown = show("inspect", tmp_path / "float", "--digests")
    assert "kind float, recipe none (float), step 5" in shown and "converted" not in shown
    assert _bits(shown) == {("float32", "32.000")}
    parameters = load_parameters(tmp_path / "float")[1]
    wanted = {f"{digest(np.asarray(parameters[path]))}  {path}" for path in declare(config)}
    assert wanted <= set(shown.splitlines())
    show("ptq", tmp_path / "float", "--recipe", "w4a16", "--method", "rtn", "--out", tmp_path / "q")
    shown = show("inspect", tmp_path / "q", "--digests")
    assert "kind packed, recipe w4a16" in shown and "layers/0/ffn/up/kernel/codes" in shown
