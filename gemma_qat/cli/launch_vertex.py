"""Runs a command on a host of a Vertex AI job, with what joins it to the others put behind it (--coordinator ...).

The host is found by CLUSTER_SPEC, which Vertex AI sets. With one host nothing is added.
"""

from __future__ import annotations

import argparse

RUNS_A_COMMAND = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the action's arguments, of which there are none but the command."""


def run(arguments: argparse.Namespace) -> int:
    """Becomes the command."""
    import os

    from gemma_qat.errors import InputError
    from gemma_qat.launch.custom import joined

    if "CLUSTER_SPEC" not in os.environ:
        raise InputError("CLUSTER_SPEC is not set: this is no host of a Vertex AI job")
    more, process = joined(os.environ["CLUSTER_SPEC"])
    # By this name the worker finds out which process it is.
    environment = os.environ | {"JOB_COMPLETION_INDEX": str(process)}
    os.execvpe(arguments.command[0], [*arguments.command, *more], environment)
