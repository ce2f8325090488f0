"""The way of a mobile model through the command line: quantize, look at, calibrate again, export, decode."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from gemma_qat import load, quantize
from gemma_qat.checkpoint.native import load_parameters, load_quantized, save_model
from gemma_qat.checkpoint.store import read_manifest
from gemma_qat.cli.main import main
from gemma_qat.data import train_tokenizer
from gemma_qat.errors import InputError
from gemma_qat.models import SIZES, initialize, static_scale_paths, uncalibrated

pytestmark = pytest.mark.usefixtures("quick_to_compile")

CONFIG = dataclasses.replace(
    SIZES["tiny_e2b"], name="cli", vocab_size=330, per_layer_vocab=330, width=32, head_width=16,
    global_head_width=32, ffn_width=32, shared_ffn_width=64, window=16, layer_kinds=("sliding", "full") * 2,
)  # fmt: skip
TEXT = "def add(left, right):\n    return left + right\n\n\nclass Point:\n    x, y = 0, 10\n" * 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float checkpoint, a tokenizer and two texts."""
    where = tmp_path_factory.mktemp("mobile")
    save_model(where / "float", initialize(CONFIG, 0), CONFIG)
    lines = [f"value_{i} = add({i}, {i * 7})\n" for i in range(200)]
    (where / "a.py").write_text(TEXT)
    (where / "b.py").write_text("".join(lines))
    train_tokenizer([TEXT, "".join(lines)], 330, where / "t.model")
    return where


def _run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(a) for a in arguments]) == 0
    return capsys.readouterr().out


def test_quantize_inspect_calibrate_export_decode(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """If it fails, a verb does not take what the one before it left."""
    text = ["--tokenizer", folder / "t.model", "--length", 16]
    out = _run(
        capsys, "ptq", folder / "float", "--recipe", "mobile", "--out", folder / "m",
        "--calibration", folder / "a.py", "--rows", 4, *text,
    )  # fmt: skip
    assert "mobile by mse" in out
    plans = read_manifest(folder / "m").plans
    before = load_parameters(folder / "m")[1]
    assert uncalibrated(before, plans) == []
    sites = len(static_scale_paths(plans))
    assert f"static scales: {sites}, of which 0 are 0" in _run(
        capsys, "inspect", folder / "m", "--rules"
    )
    out = _run(
        capsys, "calibrate", folder / "m", "--text", folder / "b.py", *text, "--batches", 2,
        "--method", "max", "--out", folder / "again",
    )  # fmt: skip
    assert f"{sites} static scales by max" in out
    after = load_parameters(folder / "again")[1]
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    assert changed and changed <= set(static_scale_paths(plans))
    codes, same = load_quantized(folder / "m")[1], load_quantized(folder / "again")[1]
    assert all(np.array_equal(codes[path].codes, same[path].codes) for path in codes)
    out = _run(capsys, "export", folder / "again", "--format", "native", "--out", folder / "x")
    assert "read back equal" in out
    decode = ["--prompt", "def add(", "--tokenizer", folder / "t.model", "--max-new-tokens", 4]
    by_floats = _run(capsys, "decode", "--ckpt", folder / "x", *decode)
    assert "def add(" in by_floats
    # Random weights, whose likeliest tokens are far apart: sums of codes give the same.
    assert _run(capsys, "decode", "--ckpt", folder / "x", *decode, "--sums", "integer") == by_floats


def test_without_text_a_static_recipe_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["ptq", str(folder / "float"), "--recipe", "mobile", "--out", str(folder / "no")]
    assert main(arguments) == 2
    line = capsys.readouterr().err.strip()
    assert "recipe mobile rounds activations with static scales: give text" in line
    assert "\n" not in line and not (folder / "no").exists()
    assert (
        main(
            [
                "calibrate",
                str(folder / "float"),
                "--text",
                str(folder / "a.py"),
                "--tokenizer",
                str(folder / "t.model"),
            ]
        )
        == 2
    )
    assert "nothing to calibrate (a float checkpoint)" in capsys.readouterr().err


def test_from_python(folder: Path) -> None:
    model = load(folder / "float")
    with pytest.raises(InputError, match="recipe q4_0 has no static scales"):
        quantize(model, "q4_0", calibration=jnp.ones((2, 8), jnp.int32))
    with pytest.raises(InputError, match="outside the vocabulary of 330"):
        quantize(model, "mobile", calibration=jnp.full((2, 8), 330))
    with pytest.raises(InputError, match=r"shape \[B, T\] expected"):
        quantize(model, "mobile", calibration=jnp.ones((8,), jnp.int32))
    fake = load(folder / "float", recipe="w8a8")
    tokens = jnp.arange(24).reshape(2, 12)
    # Equal codes and equal int32 sums; what XLA fuses around them differs between two programs by float32 roundings.
    np.testing.assert_allclose(quantize(model, "w8a8")(tokens), fake(tokens), atol=5e-6)


def test_a_recipe_is_written_and_used(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = _run(
        capsys,
        "inspect",
        "26b_a4b",
        "--recipe",
        "q4_0_google",
        "--rules",
        "--write-recipe",
        folder / "r.json",
    )
    assert "published 14.4 GB" in out and "where tiles fit" in out
    assert "14.401 GB" in _run(capsys, "inspect", "26b_a4b", "--recipe", folder / "r.json")
