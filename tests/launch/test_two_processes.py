"""The command that the README shows: two processes train what one trains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_two_processes_train_what_one_trains(tmp_path: Path) -> None:
    """If it fails, messages of one collective are taken for another's, or processes read other rows than one would."""

    def losses(*before: str) -> list[float]:
        where = tmp_path / ("two" if before else "one")
        command = [sys.executable, "-m", "gemma_qat", *before, "train", "configs/e2b_q4_0.py"]
        command += ["--variant", "tiny", f"directory={where}", f"data.path={tmp_path}/text"]
        environment = {**os.environ, "GEMMA_QAT_PYTHON": sys.executable}
        subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
        lines = (where / "tiny_e2b_q4_0" / "metrics.jsonl").read_text("utf-8").splitlines()
        return [json.loads(line)["loss"] for line in lines]

    one = losses()
    logs = str(tmp_path / "logs")
    two = losses("launch", "local", "2", "--logs", logs, "--", sys.executable, "-m", "gemma_qat")
    # Sums over the batch associate otherwise, six steps deep.
    assert len(one) == len(two) == 3
    assert two == pytest.approx(one, rel=1e-5)
