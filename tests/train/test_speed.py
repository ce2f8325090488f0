"""The file that metrics go to, and what a second of training is counted as."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gemma_qat.models import SIZES, flops_per_token, forward_flops_per_token
from gemma_qat.train import speed
from gemma_qat.train.speed import MetricsFile, Speed


def test_a_run_that_goes_on_takes_the_place_of_what_it_does_again(tmp_path: Path) -> None:
    """If it fails, a resumed run's file has steps twice, or a line that a kill cut off ends every reader."""
    path = tmp_path / "run" / "metrics.jsonl"
    first = MetricsFile(path)
    for step in (2, 4, 6):
        first.write(step, {"loss": step / 8})
    path.write_text(path.read_text() + '{"step": 8, "lo')
    again = MetricsFile(path)
    again.write(6, {"loss": 9.0})
    again.write(8, {"loss": 10.0})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [
        (2, 0.25),
        (4, 0.5),
        (6, 9),
        (8, 10),
    ]


def test_tokens_and_flops_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps of 4 rows of 128 in 2 seconds; the teacher's forward pass counts, idle questions give nothing."""
    now = iter([10.0, 12.0, 13.0])
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(now))
    size = SIZES["tiny_e2b"]
    one = Speed(size, size, rows=4)
    for _ in range(3):
        one.step(128)
    found = one.asked()
    assert found["tokens_per_second"] == 3 * 4 * 128 / 2
    each = flops_per_token(size, 128) + forward_flops_per_token(size, 128)
    assert found["model_flops_per_second"] == found["tokens_per_second"] * each
    assert "mfu" not in found  # the peak of a processor is not in the table
    assert one.asked() == {}
