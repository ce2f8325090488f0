"""Runs a command as N processes on this machine that share one run over loopback; their CPUs are the devices.

    gemma-qat launch local 2 --logs runs/logs/local -- gemma-qat train configs/e2b_q4_0.py --variant tiny

Ends with 0 when all did; with 75 when they were stopped and saved (SIGTERM, an interrupt and USR1 are passed on); else
with the status of the first that failed, whose traceback is shown last. The others have a few seconds to end.
"""

from __future__ import annotations

import argparse

RUNS_A_COMMAND = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the action's arguments."""
    parser.add_argument("processes", type=int, metavar="N", help="how many processes")
    parser.add_argument(
        "--logs", default="runs/logs/local", metavar="DIR",
        help="where process-I.log are kept (default: runs/logs/local)",
    )  # fmt: skip
    parser.add_argument(
        "--grace", type=float, default=10.0, metavar="SECONDS",
        help="how long the others may take to end when one has failed (default: 10)",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Runs them and returns one status."""
    from pathlib import Path

    from gemma_qat.cli.launch_worker import environment, resolved
    from gemma_qat.errors import InputError
    from gemma_qat.launch.processes import free_port, watch_over

    count = arguments.processes
    if count < 1:
        raise InputError(f"{count} processes: at least 1 expected")
    command = [*resolved(arguments.command), "--coordinator", f"127.0.0.1:{free_port()}"]
    return watch_over(
        {i: [*command, "--num-processes", str(count), "--process-id", str(i)] for i in range(count)},
        Path(arguments.logs), environment() | {"JAX_PLATFORMS": "cpu"},
        who="local", grace=arguments.grace,
    )  # fmt: skip
