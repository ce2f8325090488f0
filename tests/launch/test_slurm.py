"""launch/slurm.sh: what it submits, what it refuses, and a run through a simulation of Slurm.

No Slurm runs here. The simulation is one program under the names sbatch, srun and scontrol on PATH: it starts the batch
script, starts a process a node with the variables that Slurm sets, and starts the script again when it is requeued.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from gemma_qat.checkpoint.native import load_parameters
from gemma_qat.data import train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "launch" / "slurm.sh")
PAGE = ROOT / "docs" / "launch" / "slurm.md"

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


def test_the_page_shows_what_it_prints() -> None:
    """If it fails, docs/launch/slurm.md tells a person to expect something else than what happens."""
    command, shown = re.findall(
        r"```\n\$ (bash launch/slurm.sh [^\n]*)\n(.*?)```", PAGE.read_text(), re.S
    )[0]
    environment = os.environ | {"GEMMA_QAT_PYTHON": sys.executable}
    done = subprocess.run(command.split(), cwd=ROOT, env=environment, capture_output=True, text=True, check=False)  # fmt: skip
    assert done.stdout.replace(sys.executable, ".venv/bin/python") == shown, done.stderr


def test_words_survive(slurm: Slurm, tmp_path: Path) -> None:
    """If it fails, an overlay with a space or a dollar reaches the run as something else."""
    words = ["a b", "$HOME", "it's", 'say "x"', "back\\slash", "*"]
    logs = tmp_path / "logs"
    done = slurm.run("--on", "h100:2x1", "--no-check", "--logs", str(logs), "--sbatch", "--comment=a b",
                     "--cpus-per-task", "4", "train", "c.py", *words)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert slurm.calls == [["sbatch", "--parsable", "--comment=a b", f"{logs}/slurm.sh"]]
    assert done.stdout == f"job 1 (c): {logs}/slurm-1.log\n"
    text = (logs / "slurm.sh").read_text()
    assert "#SBATCH --cpus-per-task=4\n" in text and "--exclusive" not in text
    (slurm.bin / "srun").write_text('#!/bin/sh\nprintf "%s\\n" "$@" >"$OUT"\n')
    environment = {"PATH": f"{slurm.bin}:{os.environ['PATH']}", "OUT": str(tmp_path / "out")}
    subprocess.run(["bash", logs / "slurm.sh"], check=True, env=os.environ | environment)
    got = (tmp_path / "out").read_text().splitlines()
    assert got[got.index("train") :] == ["train", "c.py", *words, "--coordinator", "auto"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "c.py"], "--on MACHINE is expected"),
        (["--on", "h100:4x8"], "a command is expected after the options"),
        (["--on", "h100:4x8", "train", "--variant", "tiny"], "a config right behind it"),
        (["--on", "h900:4x8", "train", "c.py"], "unknown chip 'h900'"),
        (["--on", "v5p:2x2x1", "train", "c.py"], "a slice of TPUs, which Slurm does not give"),
        (["--on", "h100:4x8", "sweep", "c.py", "--cell", "a"], "runs on one node, such as h100:8"),
        (["--on", "h100:4x8", "--what", "train", "c.py"], "unknown option --what"),
        (
            ["--on", "h100:4x8", "--name", "a b", "--dry-run", "train", "c.py"],
            "'a b': in what sbatch reads letters",
        ),
        (
            ["--on", "h100:8", "--logs", "a b", "train", "good.py"],
            "'a b': in what sbatch reads letters",
        ),
        (["--on", "h100:8", "train", "c.py", "--dry-run"], "--dry-run stands before train"),
        (["--on", "h100:8", "--jobs", "no.jsonl"], "no.jsonl: cannot be read"),
        (["--on", "h100:8", "--retry-limit", "x", "train", "c.py"], "x: a whole number expected"),
        (["--on", "h100:8", "--dry-run", "trian", "c.py"], "train or sweep expected, not trian"),
    ],
)
def test_it_is_refused(slurm: Slurm, arguments: list[str], said: str) -> None:
    """If it fails, a mistake is found out in the queue."""
    done = slurm.run(*arguments)
    assert (done.returncode, said in done.stderr) == (2, True), done.stderr
    assert len(done.stderr.splitlines()) == 1 and not (slurm.state / "calls").exists()


def test_the_check_can_pass_over_files(slurm: Slurm, tmp_path: Path) -> None:
    """If it fails, who does not see the cluster's files has to leave out the check of memory too."""
    words = ("--on=h100:8", "--no-paths", "--dry-run", "train", "c.py", "name=a b")
    first = slurm.run(*words).stdout.splitlines()[0]
    assert first == "gemma-qat train c.py 'name=a b' --check --on h100:8 --no-paths"


def test_a_config_beside_the_caller_is_told_where_to_be(slurm: Slurm, tmp_path: Path) -> None:
    """If it fails, a config of the caller's own directory is "not there", with no word that another one is looked in."""
    (tmp_path / "mine.py").write_text("")
    done = subprocess.run(
        ["bash", SCRIPT, "--on", "h100:8", "--dry-run", "train", "mine.py"], cwd=tmp_path,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and f"root, {ROOT}: give {tmp_path}/mine.py" in done.stderr


def test_no_slurm_and_no_start_are_told(slurm: Slurm, tmp_path: Path) -> None:
    """If it fails, a laptop gets bash's own words, or a run that would not start is queued for a day."""
    done = slurm.run("--on", "h100:8", "train", "refused.py")
    assert done.returncode == 2 and done.stderr.startswith("it does not fit\nslurm.sh: error: ")
    assert not (slurm.state / "calls").exists()
    logs = ("--logs", str(tmp_path / "logs"))
    assert slurm.run("--on", "h100:8", *logs, "train", "good.py").stdout.startswith(
        "it fits\njob 1"
    )
    assert slurm.run("--on", "h100:8", "--no-check", *logs, "train", "refused.py").returncode == 0
    (slurm.bin / "sbatch").unlink()
    done = slurm.run("--on", "h100:8", "train", "good.py")
    assert done.returncode == 2 and "sbatch is not on PATH: run this on a login node" in done.stderr


def test_a_sweep_is_jobs_that_wait_for_one_another(slurm: Slurm, tmp_path: Path) -> None:
    """If it fails, a cell starts before what it needs is there, or a table is made of nothing."""
    command = ["gemma-qat", "sweep", "s.py", "a=b c", "--cell"]
    jobs = [
        {"name": "float", "needs": [], "command": [*command, "float"]},
        {"name": "q4", "needs": ["float"], "command": [*command, "q4"]},
        {"name": "both", "needs": ["float", "q4"], "command": [*command, "both"]},
    ]
    file = tmp_path / "cells.jsonl"
    file.write_text("".join(f"{json.dumps(job)}\n" for job in jobs))
    done = slurm.run("--on", "h100:8", "--jobs", str(file), "--logs", str(tmp_path / "l"))
    assert done.returncode == 0, done.stderr
    waits = [[word for word in call if word.startswith("--dep")] for call in slurm.calls]
    after = ["--dependency=afterok:1", "--dependency=afterok:1:2", "--dependency=afterany:1:2:3"]
    assert waits == [[], *([one] for one in after)]
    assert all("--kill-on-invalid-dep=yes" in call for call in slurm.calls[1:])
    last = (tmp_path / "l" / "collect" / "slurm.sh").read_text()
    assert "-- gemma-qat sweep s.py a=b\\ c --collect || status" in last
    assert "#SBATCH --job-name=cells-collect\n" in last


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


CONFIG = """
from gemma_qat.config import DataConfig, ExperimentConfig
from gemma_qat.models import SIZES, ModelConfig
from gemma_qat.train import OptimizerConfig, TrainConfig

SIZE = ModelConfig(
    name="small", layer_kinds=("full", "full"), vocab_size=330, width=32, query_heads=2, kv_heads=1,
    global_kv_heads=1, head_width=16, global_head_width=32, ffn_width=32, window=4, max_positions=64,
)
SIZES[SIZE.name] = SIZE


def get_config(variant="default"):
    return ExperimentConfig(
        name="run", model="small", recipe="q4_0", scales="recomputed",
        data=DataConfig(kind="text", path="{folder}/text", tokenizer="{folder}/t.model", length=16),
        train=TrainConfig(steps=60, batch_size=4, log_every=5, save_every=10, tensorboard=False),
        optimizer=OptimizerConfig(warmup=2, decay="constant"),
    )
"""


LITTLE = "--xla_backend_optimization_level=0"
"""Compiled with little effort: of equal programs, equal results."""


def until(so: object, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not so():  # type: ignore[operator]
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.05)


def losses(folder: Path) -> list[list[float]]:
    data = json.loads((folder / "run" / "checkpoints" / "60" / "data.json").read_text())
    return data["curves"]["loss"]


def masters(folder: Path) -> dict[str, bytes]:
    _, parameters = load_parameters(folder / "run" / "checkpoints" / "60")
    return {path: np.asarray(x).tobytes() for path, x in parameters.items()}


@pytest.mark.slow
def test_a_simulated_job_is_requeued_and_ends_as_one_that_never_was(tmp_path: Path) -> None:
    """If it fails, a job at the end of its time, or one whose node dies, loses work or goes on as another run.

    Slurm is simulated (above): two processes on this machine, on its CPUs. Of a node that died Slurm itself requeues the
    job.
    """
    (tmp_path / "text").mkdir()
    text = (
        "def add(left, right):\n    return left + right\n\n\nclass Point:\n    x, y = 0, 10\n" * 30
    )
    text += "".join(f"value_{i} = add({i}, {i * 7})\n" for i in range(200))
    (tmp_path / "text" / "a.txt").write_text(text)
    train_tokenizer([text], 330, tmp_path / "t.model")
    (tmp_path / "config.py").write_text(CONFIG.replace("{folder}", str(tmp_path)))

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
    until(lambda: len(_ended(stopped)) == 2)
    assert _ended(stopped) == ["75", "0"], told(stopped, "stopped")
    said = told(stopped, "stopped")
    steps = {int(step) for step in re.findall(r"stopped after step (\d+), saved in", said)}
    assert len(steps) == 1 and 10 <= min(steps) < 60, said
    assert [call[0] for call in stopped.calls] == ["sbatch", "srun", "scontrol", "srun"]
    submit(killed, "killed")
    until((tmp_path / "killed" / "run" / "checkpoints" / "10" / "manifest.json").exists)
    os.kill(int((killed.state / "tasks").read_text().split()[1]), signal.SIGKILL)
    until(lambda: len(_ended(killed)) == 1)
    assert _ended(killed)[0] not in ("0", "75"), told(killed, "killed")
    subprocess.run([killed.bin / "scontrol", "requeue", job("killed")], check=True,
                   env=killed.environment() | {"SLURM_JOB_ID": job("killed"), "XLA_FLAGS": LITTLE})  # fmt: skip
    until(lambda: len(_ended(killed)) == 2)
    assert _ended(killed)[1] == "0", told(killed, "killed")

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
        f"USR1 to both processes: saved step {steps}, status 75, requeued; kill -9 of one: status {_ended(killed)[0]}, "
        "requeued; both ended with the losses and the masters of a job that nobody stopped"
    )


def _ended(slurm: Slurm) -> list[str]:
    file = slurm.state / "ended"
    return file.read_text().split() if file.exists() else []
