"""What a person sees of a conversion."""

from __future__ import annotations

from pathlib import Path

import pytest

import gemma_qat
from gemma_qat.cli.main import main

GOLDEN = Path(__file__).parents[1] / "golden"


def test_it_says_what_came_in_and_what_was_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bytes and rate on the way, the model and what no parameter is made of at the end; it loads."""
    assert main(["convert", str(GOLDEN / "e_series_hub"), "--out", str(tmp_path / "out")]) == 0
    *way, summary, audio, unused, vision = capsys.readouterr().out.splitlines()
    assert all(line.startswith("converted: ") and line.endswith(" GB/s") for line in way) and way
    assert "e_series_hub in float" in summary and summary.endswith("from safetensors")
    assert audio == "carried: 2 tensors (audio)" and vision == "carried: 3 tensors (vision)"
    assert unused.startswith("left out: 15 tensors (unused key or value")
    model = gemma_qat.load(tmp_path / "out")
    assert model.config == gemma_qat.load(GOLDEN / "e_series_hub").config
