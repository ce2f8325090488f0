"""What tests of launch/slurm.sh share: a simulation of Slurm, since no Slurm runs here.

It is one program under the names sbatch, srun and scontrol on PATH: it starts the batch script, starts a process a node
with the variables that Slurm sets, and starts the script again when it is requeued.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "launch" / "slurm.sh")

SIMULATION = """#!{python}
import json, os, pathlib, subprocess, sys
state = pathlib.Path(os.environ["SIMULATED_SLURM"])
name, given = pathlib.Path(sys.argv[0]).name, sys.argv[1:]
with (state / "calls").open("a") as calls:
    calls.write(json.dumps([name, *given]) + "\\n")
job = state / "job.sh"


def begin(restarts):
    text = job.read_text()
    options = dict(line[10:].partition("=")[::2] for line in text.splitlines() if line.startswith("#SBATCH --"))
    output = open(options["output"].replace("%j", os.environ["SLURM_JOB_ID"]), "ab")
    environment = {{**os.environ, "SLURM_NNODES": options["nodes"]}}
    if restarts:
        environment["SLURM_RESTART_COUNT"] = str(restarts)
    run = ["bash", "-c", 'bash "$1"; echo $? >>"$2"', "-", str(job), str(state / "ended")]
    subprocess.Popen(run, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True)


if name == "sbatch":
    number = len((state / "calls").read_text().splitlines())
    if os.environ.get("SIMULATED_ID"):
        job.write_text(pathlib.Path(given[-1]).read_text())
        os.environ["SLURM_JOB_ID"] = os.environ["SIMULATED_ID"]
        begin(0)
    print(f"{{os.environ.get('SIMULATED_ID') or number}};simulated")
elif name == "scontrol":
    assert given == ["requeue", os.environ["SLURM_JOB_ID"]]
    begin(int(os.environ.get("SLURM_RESTART_COUNT", 0)) + 1)
elif name == "srun":
    while given[0].startswith("--"):
        given.pop(0)
    count = os.environ["SLURM_NNODES"]
    step = {{
        "SLURM_NTASKS": count, "SLURM_STEP_NUM_NODES": count, "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_TASKS_PER_NODE": f"1(x{{count}})", "SLURM_LOCALID": "0",
    }}
    tasks = [
        subprocess.Popen(given, env={{**os.environ, **step, "SLURM_PROCID": str(i), "SLURM_NODEID": str(i)}})
        for i in range(int(count))
    ]
    (state / "tasks.new").write_text(" ".join(str(task.pid) for task in tasks))
    (state / "tasks.new").rename(state / "tasks")
    sys.exit(max(status if status >= 0 else 128 - status for status in [task.wait() for task in tasks]))
"""

PYTHON = """#!/bin/sh
case "$*" in
  *"launch machine h100:4x8") printf 'HOSTS=4\\nCHIPS_PER_HOST=8\\nTOPOLOGY=\\n' ;;
  *"launch machine h100:8") printf 'HOSTS=1\\nCHIPS_PER_HOST=8\\nTOPOLOGY=\\n' ;;
  *"launch machine h100:2x1") printf 'HOSTS=2\\nCHIPS_PER_HOST=1\\nTOPOLOGY=\\n' ;;
  *"launch machine v5p:2x2x1") printf 'HOSTS=1\\nCHIPS_PER_HOST=4\\nTOPOLOGY=2x2x1\\n' ;;
  *"train refused.py --check --on h100:8") echo "it does not fit" >&2; exit 2 ;;
  *"train good.py --check --on h100:8") echo "it fits" ;;
  *) exec {python} "$@" ;;
esac
"""
"""A stand-in for the interpreter that knows machines without importing jax, which takes seconds."""


class Slurm:
    """The simulation: a folder of programs for PATH, and what they were called with."""

    def __init__(self, folder: Path) -> None:
        self.state, self.bin = folder / "state", folder / "bin"
        self.state.mkdir(parents=True)
        self.bin.mkdir()
        for name in ("sbatch", "srun", "scontrol"):
            (self.bin / name).write_text(SIMULATION.format(python=sys.executable))
            (self.bin / name).chmod(0o755)
        self.python = self.bin / "stand_in_python"
        self.python.write_text(PYTHON.format(python=sys.executable))
        self.python.chmod(0o755)

    @property
    def calls(self) -> list[list[str]]:
        """Every call, name first."""
        return [json.loads(line) for line in (self.state / "calls").read_text().splitlines()]

    def environment(self) -> dict[str, str]:
        """Ours, with the simulation on PATH."""
        return os.environ | {
            "PATH": f"{self.bin}:{os.environ['PATH']}", "SIMULATED_SLURM": str(self.state),
            "GEMMA_QAT_PYTHON": str(self.python), "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu",
        }  # fmt: skip

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs launch/slurm.sh with the simulation on PATH."""
        return subprocess.run(
            ["bash", SCRIPT, *arguments], env=self.environment() | environment,
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    return Slurm(tmp_path / "slurm")
