"""The decode half of `bench`: every packed operation of every shape of a model, then whole models."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from typing import Any


def add_decode_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what only `bench decode` reads."""
    parser.add_argument(
        "--kinds", default="all",
        help="decode: of product, integer, experts, integer_experts, head, attention, whole",
    )  # fmt: skip
    parser.add_argument(
        "--formats", default=None,
        help="decode: comma-separated, or all; q4_0,int4,int2,int8 unless given, on CPU without int4",
    )  # fmt: skip
    parser.add_argument(
        "--batches", default=None, help="decode: rows at a time; 1,8 unless given, on CPU 1"
    )
    parser.add_argument(
        "--caches", default="float,int8", help="decode: keys and values of whole models"
    )
    parser.add_argument(
        "--cache-length", type=int, default=4096, help="decode: tokens that attention looks back on"
    )
    parser.add_argument(
        "--steps", type=int, default=16, help="decode: tokens timed of whole models"
    )
    parser.add_argument(
        "--sums", default="float", choices=["float", "integer"],
        help="decode: integer: int32 sums of codes in whole models of mobile and mobile_like",
    )  # fmt: skip
    parser.add_argument(
        "--megabytes", type=int, default=None,
        help="decode: weights read in one measurement; 256 unless given, on CPU 4",
    )  # fmt: skip
    parser.add_argument(
        "--plot", default=None, metavar="FILE", help="decode: a PNG of the roofline"
    )


def run_decode(arguments: argparse.Namespace) -> int:
    """Prints a row per operation and per whole model; writes JSON and a plot where asked to."""
    import dataclasses
    from pathlib import Path

    from rich.console import Console

    from gemma_qat.cli.bench import write_figures
    from gemma_qat.cli.console import progress, writable
    from gemma_qat.decode.roofline import copy_bandwidth
    from gemma_qat.evals import bench_device
    from gemma_qat.evals.bench_cases import KINDS
    from gemma_qat.evals.bench_decode import Measure, bench_decode
    from gemma_qat.evals.bench_whole import Setting, bench_whole
    from gemma_qat.evals.plot_roofline import roofline
    from gemma_qat.models import RunOptions

    writable(arguments.json)
    writable(arguments.plot)
    asked = _Asked(arguments)
    memory = bench_device.free_memory()
    bandwidth = copy_bandwidth(max(64, asked.megabytes))
    speeds, wholes = [], []
    with progress() as report:
        for size in asked.sizes:
            kinds = [kind for kind in asked.kinds if kind in KINDS]
            measure = Measure(
                dtype=asked.dtype, rounds=asked.rounds, bytes=asked.megabytes * 2**20,
                memory=memory, bandwidth=bandwidth,
            )  # fmt: skip
            speeds += bench_decode(
                size, asked.formats, asked.batches, measure, kinds=kinds,
                cache_length=arguments.cache_length, progress=report,
            )  # fmt: skip
            if "whole" in asked.kinds:
                setting = Setting(
                    batches=asked.batches, caches=asked.caches, steps=arguments.steps,
                    options=RunOptions(dtype=asked.dtype, sums=arguments.sums),
                    memory=memory, bandwidth=bandwidth,
                )  # fmt: skip
                wholes += bench_whole(size, asked.recipes_of(size), setting, report)
    console = Console(width=None if Console().is_terminal else 150)
    for table in (_operations(asked, speeds), _models(asked, wholes)):
        if table.row_count:
            console.print(table)
    for note in dict.fromkeys(_notes([*speeds, *wholes])):
        print(note)
    print(f"a copy: {bandwidth / 1e9:.1f} GB/s, read and written")
    if arguments.json:
        write_figures(
            arguments,
            {
                "command": _command(arguments),
                "copy_bandwidth": bandwidth,
                "speeds": [dataclasses.asdict(speed) for speed in speeds],
                "whole": [dataclasses.asdict(whole) for whole in wholes],
            },
        )
    if arguments.plot:
        Path(arguments.plot).write_bytes(roofline(speeds, wholes, "png"))
    return 0


class _Asked:
    """What was asked for, checked, with what depends on the device filled in.

    Raises: InputError for a name that there is none of, or a number that is none.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        from gemma_qat.decode import CACHES
        from gemma_qat.errors import InputError
        from gemma_qat.evals.bench_cases import GRIDS, KINDS
        from gemma_qat.evals.bench_device import plain_dtype, platform
        from gemma_qat.models import FULL_SIZES, size_named
        from gemma_qat.quant import RECIPE_NAMES, families_of

        names = FULL_SIZES if arguments.size == "all" else _split(arguments.size)
        self.sizes = [size_named(name) for name in names]
        self.kinds = _among("kind", arguments.kinds, (*KINDS, "whole"))
        self.caches = _among("cache", arguments.caches, CACHES)
        self.recipes = _among("recipe", arguments.recipes or "q4_0,mobile", RECIPE_NAMES)
        self.dtype = arguments.dtype or plain_dtype()
        on_cpu = platform() == "cpu"
        formats = arguments.formats or ("q4_0,int2,int8" if on_cpu else "q4_0,int4,int2,int8")
        self.formats = _among("format", formats, GRIDS)
        self.rounds = 5 if arguments.rounds is None else arguments.rounds
        self.megabytes = arguments.megabytes
        if self.megabytes is None:
            self.megabytes = 4 if on_cpu else 256
        batches = arguments.batches or ("1" if on_cpu else "1,8")
        try:
            self.batches = [int(count) for count in batches.split(",")]
        except ValueError:
            raise InputError(f"--batches {batches}: numbers of rows expected") from None
        numbers = {
            "batches": min(self.batches), "rounds": self.rounds, "megabytes": self.megabytes,
            "steps": arguments.steps, "cache-length": arguments.cache_length,
        }  # fmt: skip
        for name, number in numbers.items():
            if number < 1:
                raise InputError(f"--{name} {number}: at least 1 expected")
        for recipe in _split(arguments.recipes or "") if arguments.recipes != "all" else ():
            families = families_of(recipe)
            if not any(size.family in families for size in self.sizes):
                given = ", ".join(f"{size.name} is {size.family}" for size in self.sizes)
                raise InputError(f"recipe {recipe} is for {', '.join(sorted(families))}; {given}")

    def recipes_of(self, size: Any) -> list[str]:
        """Returns the recipes that there are for a size."""
        from gemma_qat.quant import families_of

        return [name for name in self.recipes if size.family in families_of(name)]


def _split(given: str) -> list[str]:
    return given.split(",") if given else []


def _among(what: str, given: str, known: Iterable[str]) -> list[str]:
    from gemma_qat.errors import unknown

    names = list(known) if given == "all" else given.split(",")
    for name in names:
        if name not in known:
            raise unknown(what, name, known)
    return names


def _command(arguments: argparse.Namespace) -> str:
    """The command that asks for the same."""
    of_training = ("what", "distil", "rows", "length", "chunk", "microbatches", "remat")
    parts = [
        f"--{name.replace('_', '-')} {value}"
        for name, value in vars(arguments).items()
        if name not in of_training and value is not None
    ]
    return " ".join(["gemma-qat bench decode", *parts])


def _notes(figures: Sequence[Any]) -> list[str]:
    found = []
    for f in figures:
        what = f"{f.kind} {f.name}" if hasattr(f, "kind") else f"{f.weights}, {f.cache} cache"
        rows = f.rows if hasattr(f, "kind") else f.batch
        found += [f"{f.size}, {what}, {rows} rows: {f.note}"] if f.note else []
    return found


def _table(title: str, left: Sequence[str], right: Sequence[str]) -> Any:
    from rich.table import Table

    table = Table(title=title)
    for name in (*left, *right):
        table.add_column(name, justify="left" if name in left else "right")
    return table


def _operations(asked: _Asked, speeds: Sequence[Any]) -> Any:
    table = _table(
        f"packed operations, {asked.rounds} rounds in turn: medians",
        ("size", "kind", "name", "shape", "format", "backend"),
        ("rows", "us", "GB/s", "of a copy", f"x {asked.dtype}"),
    )
    for s in speeds:
        speedup = "-" if s.speedup is None else f"{s.speedup:.2f}"
        shape = " x ".join(str(number) for name, number in s.dims.items() if name != "chosen")
        chosen = f" ({s.dims['chosen']} chosen)" if "chosen" in s.dims else ""
        table.add_row(
            s.size, s.kind, s.name, shape + chosen, s.format, s.backend, str(s.rows),
            f"{1e6 * s.seconds:.1f}", f"{s.bandwidth / 1e9:.2f}", f"{s.share:.1%}", speedup,
        )  # fmt: skip
    return table


def _models(asked: _Asked, wholes: Sequence[Any]) -> Any:
    table = _table(
        "whole models, random weights: medians over steps",
        ("size", "weights", "cache"),
        (
            "rows",
            "GB",
            "ms a step",
            "tokens/s",
            "MB a token",
            "of the roofline",
            f"x {asked.dtype}",
        ),
    )
    for w in wholes:
        found = ["-"] * 5
        if w.seconds is not None:
            speedup = "-" if w.speedup is None else f"{w.speedup:.2f}"
            found = [
                f"{1e3 * w.seconds:.2f}", f"{w.tokens_per_second:.1f}",
                f"{w.bytes_per_token / 1e6:,.1f}", f"{w.roofline_share:.1%}", speedup,
            ]  # fmt: skip
        table.add_row(
            w.size, w.weights, w.cache, str(w.batch), f"{w.weight_bytes / 1e9:.3f}", *found
        )
    return table
