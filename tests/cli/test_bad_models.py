"""Models and texts that are no good: one line, exit status 2, and nothing written or lost."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import pytest

from gemma_qat.checkpoint.native import save_model
from gemma_qat.cli.main import main
from gemma_qat.models import SIZES, initialize

CONFIG = dataclasses.replace(
    SIZES["tiny_12b"], name="small", vocab_size=64, width=32, head_width=16, global_head_width=32,
    ffn_width=32, window=8, layer_kinds=("sliding", "full"),
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float checkpoint, and one with a nan in it."""
    where = tmp_path_factory.mktemp("models")
    parameters = initialize(CONFIG, 0)
    save_model(where / "float", parameters, CONFIG)
    path = "layers/1/ffn/up/kernel"
    poisoned = parameters | {path: parameters[path].at[0, 0].set(jnp.nan)}
    save_model(where / "nan", poisoned, CONFIG)
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
