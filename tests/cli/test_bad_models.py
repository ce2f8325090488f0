"""Models and texts that are no good: one line, exit status 2, and nothing written or lost."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from gemma_qat import load
from gemma_qat.checkpoint.native import save_model, save_static_scales
from gemma_qat.cli.main import main
from gemma_qat.data import train_tokenizer
from gemma_qat.errors import InputError
from gemma_qat.models import SIZES, fit, initialize, static_scale_paths
from gemma_qat.numerics import PackedArray
from gemma_qat.quant import recipe_named, write_recipe
from gemma_qat.train import with_scales

CONFIG = dataclasses.replace(
    SIZES["tiny_12b"], name="small", vocab_size=290, width=32, head_width=16, global_head_width=32,
    ffn_width=32, window=8, layer_kinds=("sliding", "sliding", "full"),
)  # fmt: skip
HEAD = "head/table_output_scale"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float checkpoint, one with a nan in it, quantized ones with good and bad static scales, texts, a tokenizer."""
    where = tmp_path_factory.mktemp("models")
    parameters = initialize(CONFIG, 0)
    save_model(where / "float", parameters, CONFIG)
    path = "layers/1/ffn/up/kernel"
    poisoned = parameters | {path: parameters[path].at[0, 0].set(jnp.nan)}
    save_model(where / "nan", poisoned, CONFIG)
    fitted = fit(CONFIG, "mobile_like", "frozen")
    ones = {path: jnp.ones(1) for path in static_scale_paths(fitted.plans)}
    start = with_scales(parameters | ones, fitted, "rtn")
    save_model(where / "qat", start, fitted)
    for value in ("inf", "nan", "-1"):
        bad = {HEAD: jnp.full(1, float(value))}
        save_static_scales(where / "qat", bad, where / f"scale{value}")
    lines = [f"value_{i} = add({i}, {i * 7})\n" for i in range(200)]
    (where / "a.py").write_text("".join(lines))
    (where / "empty.py").write_text("")
    for pieces in (290, 295):
        train_tokenizer(lines, pieces, where / f"{pieces}.model")
    mine = dataclasses.replace(recipe_named("q4_0", "dense"), name="mine")
    write_recipe(mine, where / "mine.json")
    save_model(where / "mine", parameters, fit(CONFIG, mine))
    return where


def _refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The line on standard error of a command that has to be refused."""
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("method", ["rtn", "mse"])
def test_weights_that_are_not_finite_have_no_codes(
    method: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    line = _refused(
        capsys, "ptq", folder / "nan", "--recipe", "q4_0", "--method", method, "--out", out
    )
    assert "layers/1/ffn/up/kernel: 1 of 1024 elements are inf or nan" in line
    assert not out.exists()


@pytest.mark.parametrize("scales", ["learned", "recomputed"])
def test_no_run_begins_with_weights_that_are_not_finite(
    scales: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If it fails, a poisoned start trains a step first, or leaves the directory of a run."""
    monkeypatch.setitem(SIZES, "small", CONFIG)
    config = tmp_path / "config.py"
    config.write_text(
        "from gemma_qat.config import ExperimentConfig\n\n\ndef get_config(variant='default'):\n"
        "    return ExperimentConfig(name='run', model='small', recipe='q4_0')\n"
    )
    line = _refused(
        capsys, "train", config, f"start={folder / 'nan'}", f"scales={scales}",
        f"directory={tmp_path / 'runs'}", f"data.path={tmp_path / 'data'}",
    )  # fmt: skip
    assert "nan: layers/1/ffn/up/kernel: 1 of 1024 elements are inf or nan" in line
    assert sorted(path.name for path in tmp_path.iterdir() if "cache" not in path.name) == [
        "config.py"
    ]


@pytest.mark.parametrize("value", ["inf", "nan", "-1"])
def test_static_scales_that_are_none(
    value: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """If it fails, a file leaves with a scale that makes zeros or nans of everything."""
    out = tmp_path / "out"
    line = _refused(capsys, "export", folder / f"scale{value}", "--format", "native", "--out", out)
    assert f"{HEAD}: static scale {float(value)}, a finite one of at least 0 expected" in line
    assert not out.exists()


def test_what_is_no_checkpoint_is_never_replaced(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """If it fails, a wrong --out deletes somebody's files."""
    (tmp_path / "work").mkdir()
    kept = tmp_path / "work" / "thesis.txt"
    kept.write_text("x")
    for out, what in ((tmp_path / "work", "a directory without"), (kept, "a file")):
        for command in (
            ["ptq", folder / "float", "--recipe", "q4_0"],
            ["export", folder / "qat", "--format", "native"],
        ):
            assert f"there is {what}" in _refused(capsys, *command, "--out", out)
        assert kept.read_text() == "x"


def test_texts_and_tokenizers_that_are_no_good(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for verb in (
        ["calibrate", folder / "qat", "--text"],
        ["ptq", folder / "float", "--recipe", "mobile_like", "--calibration"],
    ):
        out = ["--out", tmp_path / "out", "--tokenizer"]
        line = _refused(capsys, *verb, folder / "empty.py", *out, folder / "290.model")
        assert "no text to calibrate on" in line
        line = _refused(capsys, *verb, folder / "a.py", *out, folder / "295.model")
        assert "295.model: 295 pieces, but" in line and "has a vocabulary of 290" in line
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_ones_own_recipe(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """If it fails, the recipe that made a checkpoint is not known again, or another is passed over."""
    line = _refused(capsys, "inspect", folder / "mine", "--recipe", "q4_0")
    assert "recipe q4_0 asked for, the checkpoint is mine" in line
    line = _refused(capsys, "inspect", folder / "mine", "--rules")
    assert "the rules of mine are not in the checkpoint: give its file" in line
    own = ["--recipe", str(folder / "mine.json")]
    assert main(["inspect", str(folder / "mine"), "--rules", *own]) == 0
    assert "small as mine" in capsys.readouterr().out
    export = ["export", str(folder / "mine"), "--format", "native", "--out", str(tmp_path / "out")]
    assert main([*export, *own]) == 0
    line = _refused(capsys, "inspect", "12b", "--recipe", "q4_0", "--write-recipe", tmp_path)
    assert "a directory given" in line


def test_measuring_and_decoding_read_the_stored_codes(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it fails, what is measured is quantized again from the masters, not what was saved."""
    of_masters, stored = load(folder / "mine"), load(folder / "mine", packed=True)
    path = "layers/1/ffn/up/kernel"
    assert isinstance(of_masters.parameters()[path], jax.Array)
    assert isinstance(stored.parameters()[path], PackedArray)
    asked: list[bool] = []

    def refuse(directory: Path, options: object, *, packed: bool) -> None:
        asked.append(packed)
        raise InputError("seen")

    monkeypatch.setattr("gemma_qat.loading.load_model", refuse)
    end = ["--tokenizer", folder / "290.model"]
    texts = [folder / "a.py", folder / "b.py"]
    texts[1].write_text("more of it", "utf-8")
    for command in (
        ["decode", "--ckpt", folder / "mine", "--prompt", "x"],
        ["evaluate", "x=" + str(folder / "mine"), "--reference", folder / "mine", "--text", *texts],
    ):
        assert _refused(capsys, *command, *end).endswith("seen")
    assert asked == [True, True]
