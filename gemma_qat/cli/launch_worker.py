"""Runs a command as one process of a run: what launchers start on every host.

    gemma-qat launch worker --logs runs/logs/e2b -- gemma-qat train configs/e2b_q4_0.py --coordinator auto

Its output is kept in DIR/process-I.log and shown with [I] before every line. SIGTERM, SIGINT and USR1 are passed on, a
hang-up as SIGTERM. The status is the command's, 75 (saved and stopped) too, and 128+N when signal N killed it. How it
failed is kept in DIR/process-I.failed, which `gemma-qat launch failures DIR` reads.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence

RUNS_A_COMMAND = True

NUMBERED_BY = ("SLURM_PROCID", "JOB_COMPLETION_INDEX", "TPU_WORKER_ID")
"""What says which of several processes this is: Slurm, an indexed job of Kubernetes, a TPU VM."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the action's arguments."""
    parser.add_argument("--logs", required=True, metavar="DIR", help="where logs are kept")
    parser.add_argument(
        "--process", type=int, metavar="I",
        help=f"which process this is (default: {', '.join(NUMBERED_BY)}, or 0)",
    )  # fmt: skip
    parser.add_argument(
        "--retry", type=int, default=0, metavar="N",
        help="start the command again when it ends with 75, up to N times, unless it was we who were told to end",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Runs the command and returns its status."""
    import os
    from pathlib import Path

    from gemma_qat.errors import InputError
    from gemma_qat.launch.processes import watch_over

    process = arguments.process
    if process is None:
        process = number_of(os.environ)
    for name, number in (("--process", process), ("--retry", arguments.retry)):
        if number < 0:
            raise InputError(f"{name} {number}: 0 or more expected")
    return watch_over(
        {process: resolved(arguments.command)}, Path(arguments.logs), environment(),
        who=f"worker {process}", retries=arguments.retry,
    )  # fmt: skip


def number_of(environment: Mapping[str, str]) -> int:
    """Returns which process this is, as the scheduler has it."""
    from gemma_qat.errors import InputError

    for name in NUMBERED_BY:
        if value := environment.get(name):
            if not value.isdecimal():
                raise InputError(f"{name}={value}: the number of a process expected")
            return int(value)
    return 0


def resolved(command: Sequence[str]) -> list[str]:
    """Returns the command; `gemma-qat` is that of this Python, whatever PATH says."""
    if command[0] == "gemma-qat":
        return [sys.executable, "-m", "gemma_qat", *command[1:]]
    return list(command)


def environment() -> dict[str, str]:
    """Returns what the command finds in its environment: ours, that it prints without delay, and how much of a GPU.

    Unless ours says otherwise XLA takes the share that plans count with (`plan/gpus.py`), not its default of 75 %.
    """
    import os

    return {"XLA_PYTHON_CLIENT_MEM_FRACTION": ".92"} | os.environ | {"PYTHONUNBUFFERED": "1"}
