"""Quantizes a float checkpoint by rounding to nearest and writes it packed."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    parser.add_argument("source", help="a Hugging Face directory or a float checkpoint")
    parser.add_argument("--recipe", required=True, help="such as q4_0 or mobile")
    parser.add_argument("--method", default="mse", help="rtn (absmax) or mse (searched scales)")
    parser.add_argument("--out", required=True, help="directory of the packed checkpoint")


def run(arguments: argparse.Namespace) -> int:
    """Quantizes, writes, and prints the sizes."""
    from gemma_qat import api
    from gemma_qat.cli.console import progress

    model = api.load(arguments.source)
    with progress() as report:
        fitted = api.save_quantized(
            model, arguments.recipe, arguments.method, arguments.out, report
        )
    rows = api.coverage(model, arguments.recipe)
    total = sum(row["bytes"] for row in rows)
    print(
        f"{arguments.out}: {fitted.recipe} by {arguments.method}, {len(fitted.plans)} sites, {total:,.0f} bytes"
    )
    return 0
