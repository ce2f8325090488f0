"""Shows what a recipe does to a size or a checkpoint: every site, its bits, bytes and share."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    parser.add_argument(
        "source", help="a size (e2b e4b 12b 26b_a4b 31b, tiny_e2b ...) or a checkpoint directory"
    )
    parser.add_argument("--recipe", default="float", help="such as q4_0 or mobile; float for none")
    parser.add_argument(
        "--sites", action="store_true", help="a row for every stored array, not for every role"
    )


def run(arguments: argparse.Namespace) -> int:
    """Prints the coverage table and the totals."""
    from pathlib import Path

    from rich.console import Console
    from rich.table import Table

    from gemma_qat import api
    from gemma_qat.checkpoint.hf_config import read_config
    from gemma_qat.checkpoint.store import read_manifest
    from gemma_qat.models import size_named
    from gemma_qat.quant import Row, by_role

    recipe = arguments.recipe
    if Path(arguments.source).exists():
        directory = api.resolve_checkpoint(arguments.source)
        if (directory / "manifest.json").is_file():
            manifest = read_manifest(directory)
            config, recipe = manifest.config, manifest.recipe or recipe
        else:
            config = read_config(directory / "config.json")
    else:
        config = size_named(arguments.source)
    rows = api.coverage(config, recipe)
    shown = rows if arguments.sites else by_role(Row(**row) for row in rows)
    table = Table(title=f"{config.name} as {recipe}")
    for name in ("site", "format", "bits/weight", "bytes", "share", "arrays"):
        table.add_column(name, justify="left" if name in ("site", "format") else "right")
    for row in shown:
        cells = [str(row["site"]), str(row["format"]), f"{row['bits']:.3f}", f"{row['bytes']:,.0f}"]
        table.add_row(*cells, f"{row['share']:.2%}", str(row.get("count", 1)))
    console = Console(width=None if Console().is_terminal else 120)
    console.print(table)
    total = sum(row["bytes"] for row in rows)
    without = sum(row["bytes"] for row in rows if row["role"] != "per_layer_embed")
    console.print(
        f"total {total:,.0f} bytes = {total / 1e9:.3f} GB = {total / 2**30:.3f} GiB",
        highlight=False,
    )
    if without != total:
        console.print(f"without the per-layer table {without / 2**30:.3f} GiB", highlight=False)
    return 0
