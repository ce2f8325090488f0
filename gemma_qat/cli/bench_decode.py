"""The decode half of `bench`: packed products of every shape of a model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any


def run_decode(arguments: argparse.Namespace) -> int:
    """Prints a row per product; writes JSON and a plot where asked to."""
    import dataclasses
    from pathlib import Path

    from rich.console import Console

    from gemma_qat.cli.bench import write_figures
    from gemma_qat.cli.console import progress, writable
    from gemma_qat.errors import InputError, unknown
    from gemma_qat.evals.bench_decode import GRIDS, bench_decode
    from gemma_qat.evals.plot_roofline import roofline
    from gemma_qat.models import size_named

    writable(arguments.json)
    writable(arguments.plot)
    formats = list(GRIDS) if arguments.formats == "all" else arguments.formats.split(",")
    for name in formats:
        if name not in GRIDS:
            raise unknown("format", name, GRIDS)
    try:
        rows = [int(count) for count in arguments.batches.split(",")]
    except ValueError:
        raise InputError(f"--batches {arguments.batches}: numbers of rows expected") from None
    if min(rows) < 1 or arguments.rounds < 1 or arguments.megabytes < 1:
        raise InputError("--batches, --rounds and --megabytes have to be at least 1")
    with progress() as report:
        speeds = bench_decode(
            size_named(arguments.size), formats, rows, rounds=arguments.rounds,
            megabytes=arguments.megabytes, progress=report,
        )  # fmt: skip
    Console(width=None if Console().is_terminal else 140).print(_table(arguments, speeds))
    if arguments.json:
        write_figures(arguments, {"speeds": [dataclasses.asdict(speed) for speed in speeds]})
    if arguments.plot:
        Path(arguments.plot).write_bytes(roofline(speeds, "png"))
    return 0


def _table(arguments: argparse.Namespace, speeds: Sequence[Any]) -> Any:
    from rich.table import Table

    table = Table(
        title=f"{arguments.size}: packed products, {arguments.rounds} rounds in turn: medians"
    )
    for name in (
        "matrix",
        "out x in",
        "format",
        "rows",
        "backend",
        "us",
        "GB/s",
        "of a copy",
        "x bfloat16",
    ):
        left = name in ("matrix", "out x in", "format", "backend")
        table.add_column(name, justify="left" if left else "right")
    for s in speeds:
        table.add_row(
            s.matrix, f"{s.outputs} x {s.reduced}", s.format, str(s.rows), s.backend,
            f"{1e6 * s.seconds:.1f}", f"{s.bandwidth / 1e9:.2f}", f"{s.share:.1%}", f"{s.speedup:.2f}",
        )  # fmt: skip
    return table
