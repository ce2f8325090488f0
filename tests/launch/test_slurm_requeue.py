"""Jobs of launch/slurm.sh that end: which of them are requeued, and a run that goes on through a simulation of Slurm."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from launch.simulated_slurm import ROOT, Slurm
from small_run import write_run

from gemma_qat.checkpoint.native import load_parameters


@pytest.mark.parametrize(
    ("status", "failed", "restarts", "requeued", "ends"),
    [(0, 0, "", False, 0), (75, 0, "", True, 75), (75, 0, "50", False, 75), (75, 1, "", False, 1), (2, 1, "", False, 2)],
)  # fmt: skip
def test_a_status_is_requeued_or_told(
    slurm: Slurm, tmp_path: Path, status: int, failed: int, restarts: str, requeued: bool, ends: int
) -> None:
    """If it fails, a job that failed is requeued, or one that was saved is not, or is without end."""
    logs = tmp_path / "logs"
    assert (
        slurm.run("--on", "h100:8", "--no-check", "--logs", str(logs), "train", "c.py").returncode
        == 0
    )
    note = f"echo '{{}}' >{logs}/process-0.failed" if failed else ":"
    (slurm.bin / "srun").write_text(f"#!/bin/sh\nls {logs}/*.failed\n{note}\nexit {status}\n")
    (slurm.bin / "scontrol").write_text('#!/bin/sh\necho "scontrol $*"\n')
    (logs / "process-7.failed").write_text("of a run before")
    done = subprocess.run(
        ["bash", logs / "slurm.sh"], capture_output=True, text=True, check=False,
        env=os.environ | {"PATH": f"{slurm.bin}:{os.environ['PATH']}", "SLURM_JOB_ID": "9", "PYTHONPATH": str(ROOT)}
        | ({"SLURM_RESTART_COUNT": restarts} if restarts else {}),
    )  # fmt: skip
    assert done.returncode == ends
    assert ("scontrol requeue 9" in done.stdout) == requeued
    assert not (logs / "process-7.failed").exists()


LITTLE = "--xla_backend_optimization_level=0"
"""Compiled with little effort: of equal programs, equal results."""


def until(so: object, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not so():  # type: ignore[operator]
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.05)


def ended(slurm: Slurm) -> list[str]:
    file = slurm.state / "ended"
    return file.read_text().split() if file.exists() else []


def losses(folder: Path) -> list[list[float]]:
    data = json.loads((folder / "run" / "checkpoints" / "60" / "data.json").read_text())
    return data["curves"]["loss"]


def masters(folder: Path) -> dict[str, bytes]:
    _, parameters = load_parameters(folder / "run" / "checkpoints" / "60")
    return {path: np.asarray(x).tobytes() for path, x in parameters.items()}


@pytest.mark.slow
def test_a_simulated_job_is_requeued_and_ends_as_one_that_never_was(tmp_path: Path) -> None:
    """If it fails, a job at the end of its time, or one whose node dies, loses work or goes on as another run.

    Slurm is simulated: two processes on this machine, on its CPUs. Of a node that died Slurm itself requeues the
    job.
    """
    write_run(tmp_path, "steps=60, log_every=5, save_every=10")

    def job(name: str) -> str:
        # Slurm's jobs have numbers, which jax makes the coordinator's port of.
        return str(os.getpid() % 4000 + 10 * ("whole", "stopped", "killed").index(name))

    def submit(slurm: Slurm, name: str) -> None:
        done = slurm.run(
            "--on", "h100:2x1", "--no-check", "--logs", str(tmp_path / name / "logs"),
            "train", str(tmp_path / "config.py"), f"directory={tmp_path / name}",
            SIMULATED_ID=job(name), XLA_FLAGS=LITTLE,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr

    def told(slurm: Slurm, name: str) -> str:
        logs = [path.read_text() for path in (tmp_path / name / "logs").glob("slurm-*.log")]
        return "\n".join([*logs, str(slurm.calls)])

    whole, stopped, killed = (
        Slurm(tmp_path / f"slurm_{n}") for n in ("whole", "stopped", "killed")
    )
    submit(whole, "whole")
    until((whole.state / "ended").exists)
    assert (whole.state / "ended").read_text() == "0\n", told(whole, "whole")

    submit(stopped, "stopped")
    until((tmp_path / "stopped" / "run" / "checkpoints" / "10" / "manifest.json").exists)
    for task in (stopped.state / "tasks").read_text().split():
        os.kill(int(task), signal.SIGUSR1)
    until(lambda: len(ended(stopped)) == 2)
    assert ended(stopped) == ["75", "0"], told(stopped, "stopped")
    said = told(stopped, "stopped")
    steps = {int(step) for step in re.findall(r"stopped after step (\d+), saved in", said)}
    assert len(steps) == 1 and 10 <= min(steps) < 60, said
    assert [call[0] for call in stopped.calls] == ["sbatch", "srun", "scontrol", "srun"]
    submit(killed, "killed")
    until((tmp_path / "killed" / "run" / "checkpoints" / "10" / "manifest.json").exists)
    os.kill(int((killed.state / "tasks").read_text().split()[1]), signal.SIGKILL)
    until(lambda: len(ended(killed)) == 1)
    assert ended(killed)[0] not in ("0", "75"), told(killed, "killed")
    subprocess.run([killed.bin / "scontrol", "requeue", job("killed")], check=True,
                   env=killed.environment() | {"SLURM_JOB_ID": job("killed"), "XLA_FLAGS": LITTLE})  # fmt: skip
    until(lambda: len(ended(killed)) == 2)
    assert ended(killed)[1] == "0", told(killed, "killed")

    for name in ("stopped", "killed"):
        assert losses(tmp_path / name) == losses(tmp_path / "whole")
        assert masters(tmp_path / name) == masters(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == 12
    for process in (0, 1):
        log = (tmp_path / "stopped" / "logs" / f"process-{process}.log").read_text()
        assert [
            line.rsplit(" ", 1)[1] for line in log.splitlines() if line.startswith("=== ended")
        ] == ["75", "0"]
    print(
        f"USR1 to both processes: saved step {steps}, status 75, requeued; kill -9 of one: status {ended(killed)[0]}, "
        "requeued; both ended with the losses and the masters of a job that nobody stopped"
    )
