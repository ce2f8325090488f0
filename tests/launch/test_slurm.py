"""launch/slurm.sh: what it submits, and what it refuses before anything waits in a queue."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from launch.simulated_slurm import ROOT, SCRIPT, Slurm

PAGE = ROOT / "docs" / "launch" / "slurm.md"


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
