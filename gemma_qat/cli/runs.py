"""Lists the runs in directories: state, step, loss, age. Reads small files only, so hundreds take a second.

States: new, running, stopped, failed, lost, done, quantized, damaged; docs/training.md says what each means.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from gemma_qat.runs import STATES, Run, printable

_ORDERS = ("name", "age", "loss")

NOTE = 100
"""Letters of a note that the table shows; --json has all of them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    parser.add_argument(
        "directories", nargs="*", default=["runs"], metavar="DIRECTORY",
        help="where to look, four folders deep (default: runs)",
    )  # fmt: skip
    parser.add_argument(
        "--state", action="append", default=[], choices=STATES, help="only these; may be repeated"
    )
    parser.add_argument(
        "--sort", choices=_ORDERS, default="name",
        help="name; age: the last that reported first; loss: the lowest first",
    )  # fmt: skip
    parser.add_argument("--sizes", action="store_true", help="add up the bytes of every run")
    parser.add_argument(
        "--json", metavar="FILE", help="also write every figure; - prints it in place of the table"
    )


def run(arguments: argparse.Namespace) -> int:
    """Prints the table."""
    from gemma_qat.checkpoint.appear import appearing_file
    from gemma_qat.cli.console import writable
    from gemma_qat.errors import InputError
    from gemma_qat.runs import runs_in

    if arguments.json != "-":
        writable(arguments.json)
    found: list[Run] = []
    for directory in map(Path, arguments.directories):
        if not directory.is_dir():
            raise InputError(f"{directory}: no such directory")
        several = len(arguments.directories) > 1
        for one in runs_in(directory, sizes=arguments.sizes):
            found.append(dataclasses.replace(one, name=str(one.folder)) if several else one)
    chosen = [one for one in found if not arguments.state or one.state in arguments.state]
    chosen = _sorted(chosen, arguments.sort)
    text = json.dumps({"kind": "runs", "runs": [_plain(one) for one in chosen]}, indent=1) + "\n"
    if arguments.json == "-":
        print(text, end="")
        return 0
    if arguments.json:
        with appearing_file(Path(arguments.json)) as file:
            file.write_text(text, "utf-8")
    where = ", ".join(arguments.directories)
    if chosen:
        print("\n".join(table(chosen)))
    elif found:
        print(f"{where}: {len(found)} runs, none of them {' or '.join(arguments.state)}")
    else:
        print(f"{where}: no runs")
    return 0


def table(runs: Sequence[Run]) -> list[str]:
    """Returns a line a run below a line of headings; columns that are empty for all are left out."""
    rows = [_row(one) for one in runs]
    headings = [name for name in rows[0] if name in ("run", "state") or any(r[name] for r in rows)]
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in headings}

    def line(cells: dict[str, str]) -> str:
        padded = (
            cells[name].rjust(widths[name]) if name in _RIGHT else cells[name].ljust(widths[name])
            for name in headings
        )  # fmt: skip
        return "  ".join(padded).rstrip()

    return [line({name: name for name in headings}), *map(line, rows)]


_RIGHT = ("step", "loss", "speed", "reported", "saved", "size")


def _row(run: Run) -> dict[str, str]:
    steps = f"{run.step}/{run.planned}" if run.planned else ""
    speed = ""
    if run.mfu is not None:
        speed = f"MFU {100 * run.mfu:.1f} %"
    elif run.tokens_per_second is not None:
        speed = f"{_short(run.tokens_per_second, 1000, ('', 'k', 'M', 'G'))} tokens/s"
    return {
        "run": printable(run.name),
        "model": run.model,
        "recipe": run.recipe,
        "trains on": run.loss_kind,
        "state": run.state,
        "step": steps,
        "loss": "" if run.loss is None else f"{run.loss:.4g}",
        "speed": speed,
        "reported": "" if run.age is None else f"{_age(run.age)} ago",
        "saved": "" if run.saved is None else str(run.saved),
        "size": "" if run.bytes is None else _short(run.bytes, 1024, (" B", " KiB", " MiB", " GiB", " TiB")),
        "note": run.note if len(run.note) <= NOTE else f"{run.note[: NOTE - 4]} ...",
    }  # fmt: skip


def _plain(run: Run) -> dict[str, object]:
    return {**dataclasses.asdict(run), "folder": str(run.folder)}


def _sorted(runs: list[Run], by: str) -> list[Run]:
    if by == "name":
        return runs
    values = {one.folder: one.age if by == "age" else one.loss for one in runs}
    return sorted(runs, key=lambda one: (values[one.folder] is None, values[one.folder] or 0.0))


def _age(seconds: float) -> str:
    for unit, letter in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.0f} {letter}"
    return f"{seconds:.0f} s"


def _short(x: int | float, base: int, units: Sequence[str]) -> str:
    unit = 0
    while x >= base and unit < len(units) - 1:
        x, unit = x / base, unit + 1
    return f"{x:.3g}{units[unit]}"
