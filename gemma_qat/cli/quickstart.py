"""Trains, quantizes, measures, exports and decodes a tiny Gemma 4 on the standard library's source."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    parser.add_argument(
        "overlays", nargs="*", metavar="path=value", help="such as cross_entropy=true seed=1"
    )


def run(arguments: argparse.Namespace) -> int:
    """Runs the quickstart and prints its table."""
    from pathlib import Path

    from rich.console import Console

    from gemma_qat.cli.console import progress
    from gemma_qat.config import QuickstartConfig, apply
    from gemma_qat.evals import console_table, headline, write_figures, write_report
    from gemma_qat.quickstart import quickstart

    config = apply(QuickstartConfig(), arguments.overlays)
    with progress() as report:
        data = quickstart(config, report)
    _, page = write_report(data, Path(config.directory))
    write_figures(data, Path(config.directory))
    console = Console(width=None if Console().is_terminal else 120)
    console.print(console_table(data))
    console.print(headline(data))
    floats = data["float"]
    console.print(
        f"held-out loss of the float twin {floats['nll']['value']:.4f} nats/token, "
        f"of a bigram model counted on the same tokens {floats['bigram']['nll']:.4f}"
    )
    for name, recipe in data["recipes"].items():
        console.print(f"{name} export: {recipe['export']}")
    console.print(
        f"greedy tokens from packed weights equal the fake-quantized model's: {data['decode']['tokens_equal']}"
    )
    console.print(f"report: {page}   ({data['timing']['total']:.0f} s)")
    return 0
