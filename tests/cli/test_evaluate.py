"""The command that measures: whatever is read, beside a reference and beside itself, as a table and as JSON."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import pytest

import gemma_qat
from gemma_qat.checkpoint.native import save_model
from gemma_qat.cli.evaluate import _named
from gemma_qat.cli.main import main
from gemma_qat.data import train_tokenizer
from gemma_qat.evaluation import RAW_TEXT, EvaluationConfig
from gemma_qat.loading import named
from gemma_qat.models import SIZES, fit, initialize
from gemma_qat.quant import recipe_named, write_recipe
from gemma_qat.train import with_scales

pytestmark = pytest.mark.usefixtures("quick_to_compile")

CONFIG = dataclasses.replace(
    SIZES["tiny_12b"], name="small", vocab_size=290, width=32, head_width=16, global_head_width=32,
    ffn_width=32, window=8, layer_kinds=("sliding", "sliding", "full"),
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float checkpoint with its tokenizer, a QAT one whose masters have moved off it, and texts of two kinds."""
    where = tmp_path_factory.mktemp("models")
    lines = [f"value_{i} = add({i}, {i * 7})\n" for i in range(60)]
    train_tokenizer(lines, 290, where / "tokenizer.model")
    parameters = initialize(CONFIG, 0)
    parameters["embed/table"] = parameters["embed/table"] * 8.0
    save_model(where / "float", parameters, CONFIG)
    (where / "float" / "beside").mkdir()
    shutil.copy(where / "tokenizer.model", where / "float" / "beside")
    fitted = fit(CONFIG, "q4_0", "frozen")
    noise = initialize(CONFIG, 1)
    moved = {path: leaf + 0.1 * noise[path] for path, leaf in parameters.items()}
    save_model(where / "qat", with_scales(moved, fitted, "rtn"), fitted)
    other = dataclasses.replace(CONFIG, vocab_size=320)
    save_model(where / "other", initialize(other, 0), other)
    for name in ("even/a.txt", "even/b.txt", "odd/c.txt"):
        file = where / "texts" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        start = len(name) + ord(name[-5])
        file.write_text("".join(lines[start % 50 : start % 50 + 6]))
    return where


def evaluate(folder: Path, *more: object) -> dict[str, Any]:
    out = folder / "out.json"
    arguments = ["evaluate", *more, "--reference", folder / "float", "--text", folder / "texts"]
    end = ["--length", 16, "--draws", 50, "--json", out]
    assert main([str(a) for a in (*arguments, *end)]) == 0
    found: dict[str, Any] = json.loads(out.read_text())
    return found


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    ptq, gguf = folder / "ptq", folder / "m.gguf"
    base = ["--recipe", "q4_0"]
    assert main(["ptq", str(folder / "float"), *base, "--method", "rtn", "--out", str(ptq)]) == 0
    assert main(["export", str(ptq), "--format", "gguf", *base, "--out", str(gguf)]) == 0
    models = [
        f"grid={folder / 'float'}+q4_0",
        f"ptq={ptq}",
        f"gguf={gguf}",
        f"qat={folder / 'qat'}",
    ]
    return evaluate(folder, *models, "--cache", folder / "cache")


def test_one_grid_has_one_set_of_figures(found: dict[str, Any]) -> None:
    """If it fails, a checkpoint is measured as another than what was exported of it."""
    grid, ptq, gguf = (found["models"][name]["summary"] for name in ("grid", "ptq", "gguf"))
    assert ptq["kl_mean"]["value"] > 1e-4
    for name in ("nll", "kl_mean", "top1_agreement"):
        assert ptq[name] == gguf[name], "the same codes from another file"
        # Fake-quantized weights multiply in another order than packed ones: float32 rounding, 3 layers.
        assert grid[name]["value"] == pytest.approx(ptq[name]["value"], rel=1e-3, abs=1e-6)
    assert [found["models"][name]["recipe"] for name in ("grid", "ptq", "gguf")] == ["q4_0"] * 3


def test_a_qat_checkpoint_is_measured_beside_itself(found: dict[str, Any]) -> None:
    """If it fails, what deployment adds to what training saw is not told from what training did."""
    qat = found["models"]["qat"]
    assert qat["own"]["name"] == "fake-quantized masters"
    # Its stored codes are those of its masters: float32 rounding lies between, some ulps of logs below 16.
    assert 0 <= qat["own"]["summary"]["kl_mean"]["value"] < 4 * 16 * 2.0**-24
    assert qat["summary"]["kl_mean"]["value"] > 1e-3
    assert "own" not in found["models"]["ptq"]


def test_parts_add_up_to_the_whole(found: dict[str, Any]) -> None:
    """If it fails, a category or a stretch of positions is left out or counted twice."""
    text = found["text"]
    assert text["categories"] == {"even": 2, "odd": 1} and text["documents"] == 3
    model = found["models"]["ptq"]
    for parts in (model["categories"].values(), model["positions"]):
        assert sum(part["tokens"] for part in parts) == text["tokens"]
        whole = sum(part["tokens"] * part["kl_mean"]["value"] for part in parts) / text["tokens"]
        assert whole == pytest.approx(model["summary"]["kl_mean"]["value"], rel=1e-9)
    assert [part["from"] for part in model["positions"]] == [1, 2, 4, 8]
    assert "low" not in model["categories"]["odd"]["kl_mean"], "one document has no interval"
    assert sum(model["kl_histogram"]["counts"]) == text["tokens"]
    assert model["bytes"] < model["float_bytes"] / 3


def test_models_are_compared_in_pairs(found: dict[str, Any]) -> None:
    """If it fails, two models' intervals have to be compared by eye."""
    names = set(found["differences"])
    assert names == {"grid-ptq", "grid-gguf", "grid-qat", "ptq-gguf", "ptq-qat", "gguf-qat"}
    assert found["differences"]["ptq-gguf"]["kl_mean"]["value"] == 0
    assert set(found["recovered"]["qat"]) == {"grid", "ptq", "gguf"}
    assert found["environment"]["jax"] == jax.__version__


def test_python_gives_the_same_figures(folder: Path, found: dict[str, Any]) -> None:
    """If it fails, a notebook shows other numbers than the command, or a chat model is measured on text unwarned."""
    template = folder / "float" / "beside" / "chat_template.jinja"
    template.write_text("{{ messages }}")
    config = EvaluationConfig(length=16, draws=50, cache=str(folder / "cache"))
    again = gemma_qat.evaluate(
        {"ptq": gemma_qat.load(folder / "ptq")}, folder / "float", [folder / "texts"], config=config
    )
    template.unlink()
    assert again["models"]["ptq"]["summary"] == found["models"]["ptq"]["summary"]
    assert again["text"]["warnings"] == [RAW_TEXT] and not found["text"]["warnings"]


def test_names_are_paths_before_they_are_recipes(folder: Path) -> None:
    """If it fails, a folder with a plus sign in its name cannot be measured."""
    odd = folder / "a+q4_0"
    odd.mkdir()
    assert named(odd).recipe is None
    path = folder / "float"
    assert named(f"{path}+q4_0+q8_0_acts") == named(path).__class__(
        path=str(path), recipe="q4_0+q8_0_acts"
    )
    rate = folder / "rate=0.1"
    rate.symlink_to(path)
    assert _named([f"{rate}+q4_0", f"a={rate}+q4_0"], "model") == {
        f"{rate}+q4_0": f"{rate}+q4_0",
        "a": f"{rate}+q4_0",
    }


def test_what_a_recipe_file_says_is_part_of_what_is_kept(folder: Path, tmp_path: Path) -> None:
    """If it fails, hidden states kept of another recipe stand for those of an edited file."""
    file = tmp_path / "own.json"
    what = named(f"{folder / 'float'}+{file}")
    write_recipe(recipe_named("q4_0", "dense"), file)
    before = what.identity
    write_recipe(recipe_named("w2", "dense"), file)
    assert what.identity != before


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["no/such"], "no/such: no such checkpoint"),
        (["{float}+q5"], "q5"),
        (["{qat}+q4_0"], "qat: quantized already"),
        (["{other}"], "other: vocabulary of 320, that of the reference is 290"),
        (["a={float}", "--own", "a={other}"], "other: vocabulary of 320"),
        (["lr=0.1/none+q4_0"], "0.1/none+q4_0: no such checkpoint"),
        (["a={float}", "a={qat}"], "model a: given twice"),
        (["a={float}", "--own", "b={float}"], "unknown model of --own 'b': expected one of a"),
        (["a={float}", "--length", "1"], "--length 1: a number of at least 2"),
        (["a={float}", "--text", "{texts}/even/a.txt"], "1 text given, at least 2 expected"),
        (["a={float}", "--mesh", "fspd=2"], "fsdp"),
        (["a={float}", "--recipe", "q4_0"], "--recipe goes with --sensitivity; MODEL+RECIPE"),
        (["--sensitivity", "--tasks", "boolq"], "leave --tasks out"),
        (["a={float}", "--limit", "3"], "--limit goes with --tasks"),
        (["a={float}", "--json", "no/such/file.json"], "no such directory"),
        (["a={float}", "--json", "{texts}"], "the name of a file to write expected"),
    ],
)
def test_bad_input_is_one_line(
    folder: Path, more: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """If it fails, a slip costs a run, or shows a traceback."""
    names = {name: folder / name for name in ("float", "qat", "other", "texts")}
    given = [word.format(**names) for word in more]
    text = [] if "--text" in given else ["--text", str(folder / "texts")]
    assert main(["evaluate", *given, "--reference", str(folder / "float"), *text]) == 2
    out, err = capsys.readouterr()
    lines = err.strip().splitlines()
    assert len(lines) == 1 and words in lines[0]
    assert not out, "refused after something was run"
