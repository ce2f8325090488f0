"""Measures what training costs (steps of recipes beside a float step), or how fast packed weights decode."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    from gemma_qat.cli.bench_decode import add_decode_arguments

    parser.add_argument(
        "what", choices=["train", "decode"],
        help="train: steps of training; decode: every operation of one token's step, and whole models",
    )  # fmt: skip
    parser.add_argument(
        "--size", default="tiny_e2b",
        help="such as tiny_e2b (the default) or e2b; decode: several, comma-separated, or all (the five)",
    )  # fmt: skip
    parser.add_argument(
        "--recipes", default=None,
        help="comma-separated, or all; q4_0,mobile unless given (decode: mobile where the size has it)",
    )  # fmt: skip
    parser.add_argument("--distil", default="q4_0", help="recipes to distil from a float teacher")
    parser.add_argument("--rows", type=int, default=8, help="rows a step")
    parser.add_argument("--length", type=int, default=128, help="tokens a row")
    parser.add_argument("--chunk", type=int, default=0, help="positions a chunk of the loss")
    parser.add_argument("--microbatches", type=int, default=1)
    parser.add_argument(
        "--rounds", type=int, default=None, help="steps of each program: 15; decode: 5 of each operation"
    )  # fmt: skip
    parser.add_argument(
        "--dtype", default=None, choices=["float32", "bfloat16"],
        help="of activations: float32; decode, and of weights to compare with: bfloat16 but on CPU",
    )  # fmt: skip
    parser.add_argument("--remat", default="none", choices=["none", "dots", "full", "offload"])
    add_decode_arguments(parser)
    parser.add_argument("--json", default=None, metavar="FILE", help="write the figures there")


def run(arguments: argparse.Namespace) -> int:
    """Prints the table, and writes it as JSON if asked to."""
    if arguments.what == "decode":
        from gemma_qat.cli.bench_decode import run_decode

        return run_decode(arguments)
    from rich.console import Console

    from gemma_qat.cli.console import progress, writable
    from gemma_qat.errors import InputError, unknown
    from gemma_qat.evals.bench_train import Shape, bench_train
    from gemma_qat.models import RunOptions, size_named
    from gemma_qat.quant import RECIPE_NAMES, families_of

    writable(arguments.json)
    arguments.rounds = 15 if arguments.rounds is None else arguments.rounds
    arguments.dtype = arguments.dtype or "float32"
    arguments.recipes = "q4_0,mobile" if arguments.recipes is None else arguments.recipes
    recipes = _names(arguments.recipes, RECIPE_NAMES)
    distils = _names(arguments.distil, RECIPE_NAMES)
    for name in {*recipes, *distils} - set(RECIPE_NAMES):
        raise unknown("recipe", name, RECIPE_NAMES)
    size = size_named(arguments.size)
    for name in [] if arguments.recipes == "all" else [*recipes, *distils]:
        if size.family not in families_of(name):
            raise InputError(
                f"recipe {name} is for {', '.join(sorted(families_of(name)))}; {size.name} is {size.family}"
            )
    for name in ("rows", "length", "rounds", "microbatches"):
        if getattr(arguments, name) < 1:
            raise InputError(f"--{name} {getattr(arguments, name)}: at least 1 expected")
    shape = Shape(
        size=size, rows=arguments.rows, length=arguments.length,
        chunk=arguments.chunk, microbatches=arguments.microbatches,
        options=RunOptions(dtype=arguments.dtype, remat=arguments.remat),
    )  # fmt: skip
    with progress() as report:
        costs = bench_train(
            shape, recipes, distils=distils, rounds=arguments.rounds, progress=report
        )
    Console(width=None if Console().is_terminal else 120).print(_table(arguments, costs))
    if arguments.json:
        _write(arguments, costs)
    return 0


def _names(given: str, every: Sequence[str]) -> list[str]:
    if given == "all":
        return list(every)
    return [name for name in given.split(",") if name]


def _table(arguments: argparse.Namespace, costs: Sequence[Any]) -> Any:
    from rich.table import Table

    title = (
        f"{arguments.size}, {arguments.rows} x {arguments.length} tokens, {arguments.dtype}, "
        f"{arguments.rounds} rounds in turn: medians"
    )
    table = Table(title=title)
    for name in ("step", "ms", "least", "most", "x float", "MB", "x float "):
        table.add_column(name, justify="left" if name == "step" else "right")
    for cost in costs:
        times = [f"{1e3 * x:.1f}" for x in (cost.seconds, cost.least, cost.most)]
        table.add_row(
            cost.name, *times, f"{cost.time_ratio:.2f}", f"{cost.bytes / 1e6:.1f}",
            f"{cost.memory_ratio:.2f}",
        )  # fmt: skip
    return table


def _write(arguments: argparse.Namespace, costs: Sequence[Any]) -> None:
    import dataclasses

    write_figures(arguments, {"costs": [dataclasses.asdict(c) for c in costs]})


def write_figures(arguments: argparse.Namespace, figures: dict[str, Any]) -> None:
    """Writes figures to --json with what was asked for and where they were measured."""
    import json
    import platform
    from pathlib import Path

    import jax
    import jaxlib

    from gemma_qat import __version__

    about = {
        "gemma_qat": __version__, "jax": jax.__version__, "jaxlib": jaxlib.__version__,
        "python": platform.python_version(),
        "device": f"{len(jax.devices())} x {jax.devices()[0].device_kind}",
    }  # fmt: skip
    asked = {k: v for k, v in vars(arguments).items() if k not in ("json", "plot")}
    whole = {"asked": asked, "environment": about, **figures}
    Path(arguments.json).write_text(json.dumps(whole, indent=1) + "\n", "utf-8")
