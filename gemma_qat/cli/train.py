"""Trains a config file, in float or on a recipe's grid; started again, it goes on where it stopped."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    parser.add_argument(
        "config", help="a Python file with get_config(variant), such as configs/e2b_q4_0.py"
    )
    parser.add_argument(
        "overlays",
        nargs="*",
        default=[],
        metavar="path=value",
        help="such as train.steps=200 mesh.fsdp=8",
    )
    parser.add_argument(
        "--variant", default="default", help="default, or tiny: the same path in seconds"
    )


def run(arguments: argparse.Namespace) -> int:
    """Trains and prints the last loss and where the checkpoints are."""
    from pathlib import Path

    from gemma_qat import api
    from gemma_qat.cli.console import progress
    from gemma_qat.config import apply, load_config

    config = apply(load_config(Path(arguments.config), arguments.variant), arguments.overlays)
    with progress() as report:
        trained = api.train(config, report)
    step, loss = trained.curves["loss"][-1]
    print(
        f"step {step}: {config.train.loss} {loss:.4f}   {Path(config.directory) / config.name / 'checkpoints'}"
    )
    return 0
