"""Runs the cells of a sweep one after another, each a run of its own, and puts together what they come to."""

from __future__ import annotations

import gc
import json
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from gemma_qat import training
from gemma_qat.checkpoint.appear import appearing_file
from gemma_qat.checkpoint.store import write_json
from gemma_qat.config import PtqCell, SweepConfig, TrainCell
from gemma_qat.errors import InputError, Stopped, unknown
from gemma_qat.evals import methods_by_recipe, quality_against_bytes
from gemma_qat.redaction import redacted, secrets_within
from gemma_qat.sharding import make_mesh
from gemma_qat.sweep.figures import figures_of
from gemma_qat.sweep.marks import State, clear, mark, states
from gemma_qat.sweep.measure import Measure
from gemma_qat.sweep.plan import Plan, plan_of
from gemma_qat.sweep.results import collect
from gemma_qat.sweep.show import markdown, points
from gemma_qat.train import Stop

Progress = Callable[[str, int, int], None]


def run(
    sweep: SweepConfig, *, redo: bool = False, progress: Progress | None = None, stop: Stop | None = None
) -> dict[str, Any]:  # fmt: skip
    """Makes and measures every cell that is not done, and returns and writes what `collect` says of all.

    Cells that are done are left as they are, those half way go on; `redo` makes again those whose config changed. What
    went wrong with a cell is told in `failed`, and the others run.
    Raises: InputError, before anything runs, for a sweep that does not fit together, or a cell whose config changed;
        Stopped when `stop` said so.
    """
    plan, measure = _begun(sweep, progress)
    _prepare(plan, [name for name, state in states(plan).items() if state.kind != "done"], redo)
    failed: dict[str, str] = {}
    # Those that the reference comes from are measured when it is there.
    for name in (*plan.cells, *plan.measured):
        if name not in failed and not _is_finished(plan, measure, name):
            try:
                _step(plan, measure, name, progress, stop)
            except (Stopped, KeyboardInterrupt):
                raise
            except Exception as error:
                failed[name] = _told(error, secrets_within(sweep))
    return _written(plan, measure, failed)


def run_cell(
    sweep: SweepConfig, name: str, *, redo: bool = False, progress: Progress | None = None, stop: Stop | None = None
) -> State:  # fmt: skip
    """Makes and measures one cell, if it is not done, and returns how far it is.

    Raises: InputError, before anything runs, as `run` does, and when what the cell needs is not done; whatever goes
        wrong with it.
    """
    plan, measure = _begun(sweep, progress, shared=True)
    if name not in plan.cells:
        raise unknown("cell", name, plan.cells)
    if not _is_finished(plan, measure, name):
        _refuse_waiting(plan, name)
        if states(plan)[name].kind != "done":
            _prepare(plan, [name], redo)
        _step(plan, measure, name, progress, stop)
    return states(plan)[name]


def put_together(sweep: SweepConfig, *, progress: Progress | None = None) -> dict[str, Any]:
    """Measures the cells that are done and returns and writes what `collect` says; makes none.

    Raises: as `run`.
    """
    plan, measure = _begun(sweep, progress)
    failed: dict[str, str] = {}
    found = states(plan)
    for name in plan.measured:
        if found[name].kind == "done" and not _is_finished(plan, measure, name):
            try:
                measure.run(name)
                _forget()
            except Exception as error:
                failed[name] = _told(error, secrets_within(sweep))
    return _written(plan, measure, failed)


def jobs(sweep: SweepConfig, command: Sequence[str]) -> list[dict[str, Any]]:
    """Returns what a launcher starts, each after those it needs: name, needs, command.

    `command` is `gemma-qat sweep` with the arguments that name the sweep.
    Raises: InputError; FileNotFoundError.
    """
    return [
        {"name": name, "needs": list(planned.needs), "command": [*command, "--cell", name]}
        for name, planned in plan_of(sweep).cells.items()
    ]


def _begun(
    sweep: SweepConfig, progress: Progress | None, *, shared: bool = False
) -> tuple[Plan, Measure]:
    plan = plan_of(sweep)
    measure = Measure(plan, progress, shared=shared)
    measure.check()
    return plan, measure


def _prepare(plan: Plan, names: Sequence[str], redo: bool) -> None:
    """Checks what is to be made on these devices, then clears what is to be made again."""
    found = states(plan)
    for name in names:
        cell = plan.cells[name].cell
        if isinstance(cell, TrainCell):
            try:
                training.program_for(cell.config, make_mesh(cell.config.mesh))
            except InputError as error:
                raise InputError(f"cell {name}: {error}") from None
    changed = [name for name in names if found[name].kind == "changed"]
    if changed and not redo:
        more = f", and {len(changed) - 1} more cells" if len(changed) > 1 else ""
        raise InputError(
            f"{plan.cells[changed[0]].folder}: there is another run there ({found[changed[0]].why}){more}; "
            "--redo makes it again, name=NAME gives the sweep another name"
        )
    for name in changed:
        clear(plan, name)


def _step(
    plan: Plan, measure: Measure, name: str, progress: Progress | None, stop: Stop | None
) -> None:
    _refuse_waiting(plan, name)
    cell = plan.cells[name].cell
    if states(plan)[name].kind != "done":
        mark(plan, name, done=False)
        if isinstance(cell, PtqCell):
            training.quantize(cell.config, cell.method, progress)
        else:
            training.run(cell.config, progress, stop)
        mark(plan, name, done=True)
    if not _is_finished(plan, measure, name):
        measure.run(name)
    elif name == plan.sweep.reference:
        measure.keep_reference()
    _forget()
    if stop and stop(plan.cells[name].steps):
        raise Stopped(f"stopped after cell {name}; the same command goes on")


def _forget() -> None:
    """Frees what a cell compiled: no other cell runs it, and a process may hold only so many programs."""
    jax.clear_caches()
    gc.collect()


def _is_finished(plan: Plan, measure: Measure, name: str) -> bool:
    """Whether nothing is left to do for a cell now: it is done, and measured if it can be."""
    found = states(plan)
    if found[name].kind != "done":
        return False
    has_reference = (
        plan.sweep.reference not in plan.cells or found[plan.sweep.reference].kind == "done"
    )
    return name not in plan.measured or not has_reference or measure.is_kept(name)


def _refuse_waiting(plan: Plan, name: str) -> None:
    found = states(plan)
    missing = [other for other in plan.cells[name].needs if found[other].kind != "done"]
    if missing:
        raise InputError(f"cell {name} needs {', '.join(missing)}, which is not done")


def _told(error: Exception, secrets: Mapping[str, str]) -> str:
    """Returns an error in one line; one that nobody expected is printed whole. Neither holds a secret."""
    line = redacted(" ".join(str(error).split()), secrets)
    if isinstance(error, (InputError, OSError)):
        return line
    print(redacted("".join(traceback.format_exception(error)), secrets), file=sys.stderr)
    return f"{type(error).__name__}: {line}"


def _written(plan: Plan, measure: Measure, failed: Mapping[str, str]) -> dict[str, Any]:
    """Returns what there is to say of all cells, written as files of the sweep's folder."""
    document = collect(plan, measure, failed)
    plan.folder.mkdir(parents=True, exist_ok=True)
    with appearing_file(plan.folder / "sweep.json") as file:
        write_json(file, document)
    with appearing_file(plan.folder / "sweep.md") as file:
        file.write_text(markdown(document), "utf-8")
    if document["groups"]:
        figures = figures_of(document)
        with appearing_file(plan.folder / "figures.json") as file:  # In the sweep's order.
            file.write_text(json.dumps(figures, indent=1) + "\n", "utf-8")
        with appearing_file(plan.folder / "sweep.png") as file:
            file.write_bytes(quality_against_bytes(points(document), "png"))
        with appearing_file(plan.folder / "methods.png") as file:
            file.write_bytes(methods_by_recipe(figures, "png"))
    return document
