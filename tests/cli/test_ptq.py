"""Methods that look at text, through the command line and from Python."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_qat import load, quantize
from gemma_qat.checkpoint.native import load_parameters, load_quantized, save_model
from gemma_qat.cli.main import main
from gemma_qat.data import train_tokenizer
from gemma_qat.errors import InputError
from gemma_qat.models import SIZES, initialize
from gemma_qat.ptq import PtqConfig

CONFIG = dataclasses.replace(
    SIZES["tiny_12b"], name="cli", layer_kinds=("full",), vocab_size=330, width=32, head_width=16,
    global_head_width=32, ffn_width=64, window=16,
)  # fmt: skip
TEXT = "def add(left, right):\n    return left + right\n\n\nclass Point:\n    x, y = 0, 10\n" * 30


def _parameters() -> dict[str, jax.Array]:
    """Fresh parameters, but some inputs of the feed-forward matter more than others."""
    spread = np.exp(np.random.default_rng(0).standard_normal(CONFIG.width))
    norm = {"layers/0/pre_ffn_norm/weight": jnp.asarray(spread, jnp.float32)}
    return initialize(CONFIG, 0) | norm


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float checkpoint, a tokenizer and a text."""
    where = tmp_path_factory.mktemp("ptq")
    save_model(where / "float", _parameters(), CONFIG)
    lines = "".join(f"value_{i} = add({i}, {i * 7})\n" for i in range(200))
    (where / "a.py").write_text(TEXT + lines)
    train_tokenizer([TEXT, lines], 330, where / "t.model")
    return where


@pytest.mark.slow
def test_awq_changes_a_norm_and_says_so_in_the_codes(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """If it fails, scales are folded into weights and not out of what stands before, or not written."""
    text = ["--calibration", str(folder / "a.py"), "--tokenizer", str(folder / "t.model")]
    by = ["--recipe", "q4_0", "--length", "16", "--rows", "16"]
    out = str(folder / "awq")
    assert main(["ptq", str(folder / "float"), *by, *text, "--method", "awq", "--out", out]) == 0
    said = capsys.readouterr().out
    assert "q4_0 by awq, 7 sites" in said
    assert "256 tokens of text looked at" in said  # 16 full rows
    floats, codes = load_parameters(folder / "awq")[1], load_quantized(folder / "awq")[1]
    assert len(codes) == 7
    before = {path: np.asarray(leaf) for path, leaf in _parameters().items()}
    norm = "layers/0/pre_ffn_norm/weight"
    scale = before[norm] / np.asarray(floats[norm])
    assert scale.std() > 0.05
    gate, w = codes["layers/0/ffn/gate/kernel"], before["layers/0/ffn/gate/kernel"]
    back = np.asarray(gate.dequantize()) / scale[:, None]
    assert np.abs(back - w).mean() < 0.15 * np.abs(w).mean()
    logits = [
        m(jnp.ones((1, 8), jnp.int32)) for m in (load(folder / "float"), load(folder / "awq"))
    ]
    assert float(jnp.std(logits[1] - logits[0])) < 0.3 * float(jnp.std(logits[0]))


def test_importance_from_python(folder: Path) -> None:
    """If it fails, an option is taken and not acted on, or text that nothing looks at is taken."""
    model, tokens = load(folder / "float"), np.random.default_rng(0).integers(3, 330, (4, 16))
    options = PtqConfig(importance=True)
    plain = quantize(model, "q4_0", "rtn").leaves()
    weighed = quantize(model, "q4_0", "rtn", tokens, config=options).leaves()
    assert any(
        not np.array_equal(plain[path].scale, weighed[path].scale)
        for path in plain
        if path.endswith("kernel")
    )
    with pytest.raises(InputError, match="rtn looks at no text: nothing to calibrate"):
        quantize(model, "q4_0", "rtn", tokens)
    with pytest.raises(InputError, match="give text"):
        quantize(model, "q4_0", "rtn", config=options)
