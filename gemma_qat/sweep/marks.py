"""How far the cells of a sweep are: what is marked as begun or done, and what lies in their folders."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any, Literal

from gemma_qat.checkpoint.appear import appearing_file
from gemma_qat.checkpoint.store import write_json
from gemma_qat.config import ExperimentConfig, flatten, from_json, to_json
from gemma_qat.errors import InputError
from gemma_qat.sweep.plan import Plan, Planned
from gemma_qat.train import latest_save

Kind = Literal["done", "begun", "ready", "waiting", "changed"]


@dataclasses.dataclass(frozen=True)
class State:
    """How far a cell is: `step` of those begun and done, `why` of those changed and waiting."""

    kind: Kind
    step: int = 0
    why: str = ""


def states(plan: Plan) -> dict[str, State]:
    """Returns how far every cell is."""
    found: dict[str, State] = {}
    for name, planned in plan.cells.items():
        missing = [other for other in planned.needs if found[other].kind != "done"]
        state = _state(plan, planned)
        if state.kind == "ready" and missing:
            state = State("waiting", why=f"for {', '.join(missing)}")
        found[name] = state
    return found


def mark(plan: Plan, name: str, *, done: bool) -> None:
    """Marks a cell as begun, or done, with what it now is."""
    plan.hidden.mkdir(parents=True, exist_ok=True)
    with appearing_file(_mark_of(plan, name)) as file:
        write_json(file, {"digest": plan.cells[name].digest, "done": done})


def clear(plan: Plan, name: str) -> None:
    """Deletes a cell's run and what was measured of it.

    Raises: InputError for a folder that is no run.
    """
    folder = plan.cells[name].folder
    if folder.is_dir():
        if any(folder.iterdir()) and not (folder / "config.json").is_file():
            raise InputError(f"{folder}: no run (no config.json in it), so it is not deleted")
        _mark_of(plan, name).unlink(missing_ok=True)
        shutil.rmtree(folder)
    _mark_of(plan, name).unlink(missing_ok=True)
    (plan.hidden / f"{name}.npz").unlink(missing_ok=True)


def _state(plan: Plan, planned: Planned) -> State:
    name, folder = planned.cell.name, planned.folder
    last = latest_save(folder / "checkpoints") if (folder / "checkpoints").is_dir() else None
    step = int(last.name) if last else 0
    marked = _read(_mark_of(plan, name))
    if marked is None:
        if not folder.exists() or not any(folder.iterdir()):
            return State("ready")
        why = _other(folder / "config.json", planned.cell.config)
        return State("changed", step, why) if why else State("begun", step)
    if marked.get("digest") != planned.digest:
        why = _other(folder / "config.json", planned.cell.config) if folder.exists() else ""
        return State("changed", step, why or "what it comes from has changed")
    if marked.get("done") and last is not None:
        return State("done", step)
    return State("begun", step) if folder.exists() else State("ready")


def _other(file: Path, config: ExperimentConfig) -> str:
    """Returns how the config that a run was made with differs, in words; empty when it does not."""
    try:
        before = flatten(from_json(ExperimentConfig, file.read_text("utf-8")))
    except (OSError, UnicodeDecodeError, InputError):
        return "there is no config.json that can be read"
    now = flatten(from_json(ExperimentConfig, to_json(config)))  # as it would be written
    differ = [
        f"{path}={before.get(path)} before, now {now.get(path)}"
        for path in sorted(before.keys() | now.keys())
        if before.get(path) != now.get(path) and not path.startswith(("directory", "mesh.", "data.cache"))
    ]  # fmt: skip
    more = f" and {len(differ) - 1} more" if len(differ) > 1 else ""
    return differ[0] + more if differ else ""


def _mark_of(plan: Plan, name: str) -> Path:
    return plan.hidden / f"{name}.json"


def _read(file: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
