"""Bad input ends in one line that says what to change, with exit status 2, and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from gemma_qat.cli.main import main

GOLDEN = Path(__file__).parents[1] / "golden"
CONFIG = str(Path(__file__).parents[2] / "configs" / "e2b_q4_0.py")

CASES = {
    "unknown size": (["inspect", "e2bb"], "unknown size 'e2bb'"),
    "unknown recipe": (["inspect", "e2b", "--recipe", "q40"], "nearest: q4_0"),
    "recipe that does not fit": (["inspect", "31b", "--recipe", "mobile"], "meant for e2b, e4b"),
    "recipe file that is missing": (["inspect", "e2b", "--recipe", "mine.json"], "mine.json: no such recipe file"),
    "rules of no recipe": (["inspect", "e2b", "--rules"], "float has no rules"),
    "recipe for other sizes": (["inspect", "26b_a4b", "--recipe", "int8_training"], "no quantized backward pass"),
    "calibrating without a checkpoint": (
        ["calibrate", "no/such", "--text", "x.py", "--tokenizer", "no.model"], "no/such: no such checkpoint",
    ),
    "calibration method": (
        ["calibrate", "no/such", "--text", "x", "--tokenizer", "y", "--method", "mean"], "unknown calibration method",
    ),
    "calibration text without tokenizer": (
        ["ptq", str(GOLDEN / "dense"), "--recipe", "w8a8", "--calibration", "x.py", "--out", "OUT"], "no tokenizer lies beside it; give --tokenizer",
    ),
    "method of static scales": (
        ["ptq", str(GOLDEN / "dense"), "--recipe", "q4_0", "--out", "OUT", "--static-method", "mean"],
        "unknown calibration method",
    ),
    "PTQ method": (["ptq", "no/such", "--recipe", "q4_0", "--out", "OUT", "--method", "aqw"], "nearest: awq"),
    "method that looks at text": (
        ["ptq", "no/such", "--recipe", "q4_0", "--out", "OUT", "--method", "awq"], "--method awq looks at text: give some with --calibration",
    ),
    "importance of nothing": (
        ["ptq", "no/such", "--recipe", "q4_0", "--out", "OUT", "--importance"], "--importance looks at text: give some with --calibration",
    ),
    "no damping": (
        ["ptq", "no/such", "--recipe", "q4_0", "--method", "gptq", "--damping", "0", "--calibration", "x", "--out", "OUT"],
        "ptq.damping=0.0: a number from 1e-9 to 1e9",
    ),
    "frozen scales of a float start": (
        ["train", CONFIG, "--variant", "tiny", "scales=frozen"], "scales=frozen keeps the scales of a quantized start",
    ),
    "loss in chunks that do not divide": (
        ["train", CONFIG, "--variant", "tiny", "train.loss_chunk=5"], "train.loss_chunk=5 does not divide rows of",
    ),
    "the same in a plan": (
        ["plan", CONFIG, "--topology", "v5e:2x2", "--estimate", "data.length=64", "train.loss_chunk=50"],
        "train.loss_chunk=50 does not divide rows of 64",
    ),
    "the same in a benchmark": (["bench", "train", "--chunk", "50", "--length", "64"], "does not divide rows of 64"),
    "the same for a teacher's words": (
        ["distill-cache", CONFIG, "--variant", "tiny", "--out", "OUT", "--k", "4", "--part", "0/1",
         "data.length=64", "train.loss_chunk=50"], "does not divide rows of 64",
    ),
    "words of no teacher": (
        ["distill-cache", CONFIG, "--variant", "tiny", "--out", "OUT", "--k", "4", "--part", "0/1"], "give teacher or start",
    ),
    "a benchmark of a recipe for others": (["bench", "train", "--size", "tiny_12b", "--recipes", "mobile"], "mobile is for"),
    "figures into nowhere": (
        ["bench", "train", "--json", "no/such/figures.json"], "no/such/figures.json: no such directory",
    ),
    "a plan of cached words": (
        ["plan", CONFIG, "--topology", "v5e:2x2", "--estimate", "train.loss=kl", "teacher_cache=w"], "leave teacher_cache out",
    ),
    "an intermediate that nobody names": (
        ["train", CONFIG, "--variant", "tiny", 'options.offload=("attn_ou",)'], "nearest: attn_out",
    ),
    "adapters on no site": (
        ["train", CONFIG, "--variant", "tiny", "start=no/such", "lora.rank=2", 'lora.sites=("nothing",)'], "nothing",
    ),
    "never logged": (["train", CONFIG, "--variant", "tiny", "train.log_every=0"], "log_every=0: at least 1 expected"),
    "no steps": (["train", CONFIG, "--variant", "tiny", "train.steps=0"], "steps=0: at least 1 expected"),
    "unknown start of scales": (
        ["train", CONFIG, "--variant", "tiny", "scales=recomputed", "scale_init=mze"], "nearest: mse",
    ),
    "missing checkpoint": (["ptq", "no/such", "--recipe", "q4_0", "--out", "OUT"], "no/such: no such checkpoint"),
    "an option of another method": (
        ["ptq", "no/such", "--recipe", "q4_0", "--damping", "0.1", "--out", "OUT"], "--damping is of --method gptq, not of mse",
    ),
    "nothing to convert": (["convert", "no/such", "--out", "OUT"], "no/such: no such checkpoint"),
    "converting what nobody knows": (["convert", str(GOLDEN), "--out", "OUT"], "no checkpoint that is known"),
    "missing config": (["train", "configs/nope.py"], "configs/nope.py: no such config file"),
    "unknown key": (["train", CONFIG, "train.stepz=3"], "nearest: steps"),
    "wrong type": (["train", CONFIG, "train.steps=1e-3"], "train.steps=1e-3"),
    "unknown variant": (["train", CONFIG, "--variant", "huge"], "unknown variant 'huge'"),
    "tile that does not divide": (
        ["ptq", str(GOLDEN / "dense"), "--recipe", "q4_0", "--out", "OUT"], "tile 32 does not divide",
    ),
    "not a checkpoint": (["export", str(GOLDEN), "--format", "gguf", "--out", "OUT"], "neither a Hugging Face"),
    "unknown sums": (
        ["decode", "--ckpt", str(GOLDEN / "dense"), "--prompt", "x", "--sums", "int"], "unknown sums 'int': expected one of float, integer (nearest: integer)",
    ),
    "no codes to sum": (
        ["decode", "--ckpt", str(GOLDEN / "dense"), "--prompt", "x", "--sums", "integer"], "no packed weight whose input",
    ),
    "nothing to measure": (["evaluate", "--reference", "x", "--text", "y"], "no model to evaluate: give MODEL"),
    "sensitivity of two models": (
        ["evaluate", "m", "--sensitivity", "--reference", "x", "--text", "y"], "leave models and --own out",
    ),
    "a figure of no kind": (
        ["evaluate", "--sensitivity", "--reference", "x", "--text", "y", "--plot", "z.jpg"], "ends in .svg or .png",
    ),
    "a proposal without a budget": (
        ["evaluate", "--sensitivity", "--reference", "x", "--text", "y", "--propose", "z.json"], "a budget is needed",
    ),
    "options of a study alone": (
        ["evaluate", "m", "--reference", "x", "--text", "y", "--budget", "1GB"], "--budget goes with --sensitivity",
    ),
    "missing tokenizer": (
        ["decode", "--ckpt", str(GOLDEN / "dense"), "--prompt", "x", "--tokenizer", "no.model"], "no.model",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_one_line_and_exit_status_2(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, message = CASES[name]
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert not list(tmp_path.iterdir())


def test_a_truncated_safetensors_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_bytes((GOLDEN / "dense" / "config.json").read_bytes())
    whole = (GOLDEN / "dense" / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    out = tmp_path / "out"
    assert main(["ptq", str(tmp_path), "--recipe", "q4_0", "--out", str(out)]) == 2
    assert "not a readable safetensors file" in capsys.readouterr().err
    assert not out.exists()
