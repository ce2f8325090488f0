"""Prints which of several processes failed first with its traceback, then the others in a line each.

    gemma-qat launch failures runs/logs/e2b_q4_0

An error of a process's own comes before one that only says that another process is gone; the time decides among equals.
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the action's arguments."""
    parser.add_argument("logs", metavar="DIR", help="where gemma-qat launch worker kept the logs")


def run(arguments: argparse.Namespace) -> int:
    """Prints."""
    from pathlib import Path

    from gemma_qat.launch.failures import failures_in, told

    found = failures_in(Path(arguments.logs))
    print("\n".join(told(found)) if found else f"{arguments.logs}: no process failed")
    return 0
