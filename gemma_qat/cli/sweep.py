"""Runs the cells of a sweep, goes on where it stopped, and ends in one table and one plot.

A sweep is a Python file with get_sweep(variant). An overlay is for every cell's config, or for the sweep where it has
that field: directory, reference, evaluation. Started again, cells that are done are left, one half way goes on. A cell
that fails is told at the end, with exit status 1; what does not fit together is refused before anything runs.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gemma_qat.cli.starting import Starting


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    parser.add_argument(
        "config", help="a Python file with get_sweep(variant), such as configs/sweep_tiny.py"
    )
    parser.add_argument("overlays", nargs="*", default=[], metavar="path=value",
                        help="such as train.steps=200 evaluation.length=256")  # fmt: skip
    parser.add_argument(
        "--variant",
        default="default",
        help="default, tiny (the same with few steps), or another that the config has",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="only show how far the cells are")
    what.add_argument(
        "--emit", metavar="FILE",
        help="only write a line of JSON a cell, for launchers: name, needs, command",
    )  # fmt: skip
    what.add_argument("--cell", metavar="NAME", help="run one cell, when what it needs is done")
    what.add_argument(
        "--collect", action="store_true",
        help="run no cell; measure what is done, and end in the table",
    )  # fmt: skip
    parser.add_argument("--redo", action="store_true", help="make cells again whose config changed")


def run(arguments: argparse.Namespace) -> int:
    """Runs, lists or emits; prints the table."""
    from gemma_qat.cli.starting import answers_while_starting

    with answers_while_starting() as starting:
        return _sweep(arguments, starting)


def _sweep(arguments: argparse.Namespace, starting: Starting) -> int:
    from pathlib import Path

    from gemma_qat import sweep
    from gemma_qat.cli.console import progress
    from gemma_qat.cli.secrets import hide
    from gemma_qat.config import load_sweep, overlaid
    from gemma_qat.train import stop_on_signals

    config = hide(
        overlaid(load_sweep(Path(arguments.config), arguments.variant), arguments.overlays)
    )
    if arguments.list:
        _print_states(sweep.plan_of(config))
        return 0
    if arguments.emit:
        return _emit(config, arguments)
    with stop_on_signals(starting.over) as stop, progress() as report:
        if arguments.cell:
            how = {"redo": arguments.redo, "progress": report, "stop": stop}
            state = sweep.run_cell(config, arguments.cell, **how)
            print(f"{arguments.cell}: {state.kind}")
            return 0
        if arguments.collect:
            found = sweep.put_together(config, progress=report)
        else:
            found = sweep.run(config, redo=arguments.redo, progress=report, stop=stop)
    _print(found, Path(config.directory) / config.name)
    return 1 if found["failed"] else 0


def _print_states(plan: Any) -> None:
    from gemma_qat.sweep import states

    found = states(plan)
    width = max(map(len, found)) + 2
    labels = max(16, *(len(planned.cell.label) + 2 for planned in plan.cells.values()))
    for name, state in found.items():
        planned = plan.cells[name]
        said = {
            "begun": f"at step {state.step} of {planned.steps}",
            "waiting": f"waiting {state.why}",
            "changed": f"changed: {state.why}",
        }.get(state.kind, state.kind)
        config = planned.cell.config
        print(f"{name:<{width}}{config.recipe:<16}{planned.cell.label:<{labels}}{said}")


def _emit(config: Any, arguments: argparse.Namespace) -> int:
    import json
    from pathlib import Path

    from gemma_qat.checkpoint.appear import appearing_file
    from gemma_qat.cli.console import writable
    from gemma_qat.sweep import jobs

    writable(arguments.emit)
    command = ["gemma-qat", "sweep", arguments.config, *arguments.overlays]
    if arguments.variant != "default":
        command += ["--variant", arguments.variant]
    if arguments.redo:
        command += ["--redo"]
    found = jobs(config, command)
    with appearing_file(Path(arguments.emit)) as file:
        file.write_text("".join(f"{json.dumps(job)}\n" for job in found), "utf-8")
    print(f"{arguments.emit}: {len(found)} jobs; when they are done: {' '.join(command)} --collect")
    return 0


def _print(found: Any, folder: Any) -> None:
    from rich.console import Console

    from gemma_qat.sweep import console_table

    console = Console(width=None if Console().is_terminal else 140)
    if found["groups"]:
        console.print(console_table(found))
    for name, cell in found["cells"].items():
        if name in found["failed"]:
            console.print(f"{name}: failed: {found['failed'][name]}", markup=False, soft_wrap=True)
        elif cell["state"] != "done":
            console.print(f"{name}: {cell['state']}", markup=False, soft_wrap=True)
    drawn = ", sweep.png, methods.png, figures.json" if found["groups"] else ""
    console.print(f"{folder}/sweep.json, sweep.md{drawn}", markup=False, soft_wrap=True)
