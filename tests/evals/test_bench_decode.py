"""The figures of packed products: which are measured, and that they are quotients of one another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gemma_qat.cli.main import main
from gemma_qat.evals.bench_decode import bench_decode, matrices_of
from gemma_qat.models import SIZES, size_named


def test_matrices_of_a_model() -> None:
    """If it fails, a shape of the model is not measured, or one is measured that no step multiplies with."""
    found = {(m.outputs, m.reduced, m.experts) for m in matrices_of(size_named("26b_a4b"))}
    assert {
        (262144, 2816, 0),
        (704, 2816, 128),
        (2816, 704, 128),
        (2112, 2816, 0),
        (2816, 2112, 0),
    } <= found
    assert (128, 2816, 0) in found  # the router
    small = {(m.outputs, m.reduced) for m in matrices_of(size_named("e2b"))}
    assert {(262144, 1536), (12288, 1536), (256, 1536), (1536, 256)} <= small


def test_speeds_are_of_what_is_read() -> None:
    """If it fails, bandwidth or speedup are of other bytes or seconds than are reported."""
    speeds = bench_decode(SIZES["tiny_e2b"], ["q4_0"], [2], rounds=1, megabytes=1)
    assert {s.matrix for s in speeds} >= {"head", "ffn_gate", "attn_q"}
    for s in speeds:
        assert s.bytes == s.outputs * s.reduced * 4.5 / 8
        assert s.bandwidth == pytest.approx(s.bytes / s.seconds)
        assert s.speedup == pytest.approx(s.bfloat16_seconds / s.seconds)
        assert s.backend == "blocked" and "blocked takes it" in s.why


def test_the_verb(tmp_path: Path, capsys: Any) -> None:
    """If it fails, the figures a person asked for are not there, or a wrong name ends in a traceback."""
    bench = ["bench", "decode", "--size", "tiny_31b", "--rounds", "1", "--megabytes", "1"]
    files = ["--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png")]
    assert main([*bench, "--formats", "int4", "--batches", "1", *files]) == 0
    assert "of a copy" in capsys.readouterr().out
    written = json.loads((tmp_path / "a.json").read_text())
    assert written["speeds"] and written["environment"]["jax"]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert main([*bench, "--formats", "int5"]) == 2
    assert "unknown format 'int5'" in capsys.readouterr().err
    assert main([*bench, "--batches", "one"]) == 2
    assert "numbers of rows expected" in capsys.readouterr().err
