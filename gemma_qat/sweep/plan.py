"""What a sweep comes to before anything runs: every cell resolved and checked, each after those that it needs.

A cell's *digest* is of what it computes: its config without where it runs (name, directory, mesh, where rows are kept),
what is in its recipe's file, and the digests of the cells it begins from and learns from. So a change anywhere makes
stale all that follows from it, and moving a sweep makes nothing stale. The *group* is the same without the seed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma_qat.config import Cell, ExperimentConfig, PtqCell, SweepConfig, TrainCell
from gemma_qat.config.values import encode
from gemma_qat.errors import InputError, nearest
from gemma_qat.quant import recipe_text
from gemma_qat.sharding import MeshConfig
from gemma_qat.start import model_of, resolve_checkpoint

HIDDEN = ".sweep"
"""The folder, in a sweep's, of what belongs to no run: marks, records of tokens, hidden states of the reference."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+=-]*")
_TAKEN = ("reference", "rows")
_PTQ_READS = ("model", "recipe", "start", "calibration", "data", "options", "ptq")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planned:
    """A cell as it is run: names in its config are paths. `needs` are the cells that have to be done before."""

    cell: Cell
    needs: tuple[str, ...]
    digest: str
    group: str

    @property
    def folder(self) -> Path:
        """Its run's folder."""
        return Path(self.cell.config.directory) / self.cell.name

    @property
    def steps(self) -> int:
        """How many steps it trains."""
        return self.cell.config.train.steps if isinstance(self.cell, TrainCell) else 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """All cells by name, each after those that it needs. `reference` is a path, `measured` are compared with it."""

    sweep: SweepConfig
    cells: Mapping[str, Planned]
    reference: Path
    measured: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """The sweep's folder."""
        return folder_of(self.sweep)

    @property
    def hidden(self) -> Path:
        """Where what belongs to no run is kept."""
        return self.folder / HIDDEN


def folder_of(sweep: SweepConfig) -> Path:
    """Returns where a sweep's files go."""
    return Path(sweep.directory) / sweep.name


def plan_of(sweep: SweepConfig) -> Plan:
    """Returns the sweep in an order that it can run in; reads no array and writes nothing.

    Raises: InputError, naming the cell, for anything that does not fit together; FileNotFoundError for a checkpoint
        that is not there.
    """
    cells = {cell.name: cell for cell in sweep.cells}
    _check_names(sweep)
    parents = {name: _parents(cell, sweep, cells) for name, cell in cells.items()}
    order = _ordered(parents)
    reference = sweep.reference
    _found(reference, "reference", cells)
    if reference in cells and cells[reference].config.recipe != "float":
        raise InputError(f"reference {reference}: a float cell expected")
    before = _ancestors(reference, parents) if reference in cells else set()
    planned: dict[str, Planned] = {}
    for name in order:
        needs = parents[name]
        if reference in cells and name != reference and name not in before:
            needs = tuple(dict.fromkeys((*needs, reference)))
        resolved = _resolved(cells[name], sweep, cells)
        _check(resolved, cells[name], sweep, cells)
        planned[name] = Planned(
            cell=resolved, needs=needs,
            digest=_digest(cells[name], {n: p.digest for n, p in planned.items()}, sweep),
            group=_digest(cells[name], {n: p.group for n, p in planned.items()}, sweep, seedless=True),
        )  # fmt: skip
    path = planned[reference].folder if reference in cells else Path(reference)
    return Plan(
        sweep=sweep, cells=planned, reference=path,
        measured=tuple(name for name in planned if name != reference),
    )  # fmt: skip


def _check_names(sweep: SweepConfig) -> None:
    if not sweep.cells:
        raise InputError(f"sweep {sweep.name}: no cells in it")
    seen: set[str] = set()
    for what, name in (("sweep", sweep.name), *(("cell", cell.name) for cell in sweep.cells)):
        if not _NAME.fullmatch(name) or (what == "cell" and name in _TAKEN):
            raise InputError(
                f"{what} {name!r}: the name of a folder expected, of letters, digits and _.+=-, other than "
                f"{', '.join(_TAKEN)}"
            )
    for cell in sweep.cells:
        if cell.name in seen:
            raise InputError(f"cell {cell.name}: there are two of that name")
        seen.add(cell.name)


def _meant(text: str, sweep: SweepConfig) -> str:
    return sweep.reference if text == "reference" else text


def _parents(cell: Cell, sweep: SweepConfig, cells: Mapping[str, Cell]) -> tuple[str, ...]:
    said = (_meant(text, sweep) for text in (cell.config.start, cell.config.teacher))
    return tuple(dict.fromkeys(name for name in said if name in cells))


def _ordered(parents: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Returns the names, each after its parents, else as they came."""
    order: list[str] = []

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            circle = " -> ".join((*path[path.index(name) :], name))
            raise InputError(f"cells need one another in a circle: {circle}")
        if name not in order:
            for parent in parents[name]:
                visit(parent, (*path, name))
            order.append(name)

    for name in parents:
        visit(name, ())
    return order


def _ancestors(name: str, parents: Mapping[str, tuple[str, ...]]) -> set[str]:
    found: set[str] = set()
    todo = list(parents[name])
    while todo:
        one = todo.pop()
        found.add(one)
        todo.extend(parents[one])
    return found


def _resolved(cell: Cell, sweep: SweepConfig, cells: Mapping[str, Cell]) -> Cell:
    folder = folder_of(sweep)

    def path(text: str) -> str:
        meant = _meant(text, sweep)
        return str(folder / meant) if meant in cells else meant

    config = cell.config
    config = dataclasses.replace(
        config, name=cell.name, directory=str(folder),
        start=path(config.start), teacher=path(config.teacher),
    )  # fmt: skip
    return dataclasses.replace(cell, config=config)


def _check(cell: Cell, said: Cell, sweep: SweepConfig, cells: Mapping[str, Cell]) -> None:
    try:
        _check_config(cell, said, sweep, cells)
    except (InputError, FileNotFoundError) as error:
        raise type(error)(f"cell {cell.name}: {error}") from None


def _check_config(cell: Cell, said: Cell, sweep: SweepConfig, cells: Mapping[str, Cell]) -> None:
    config = cell.config
    model_of(config)
    for what, text in (("start", said.config.start), ("teacher", said.config.teacher)):
        meant = _meant(text, sweep)
        if meant:
            _found(meant, what, cells)
        if meant in cells:
            _check_parent(what, meant, config, cells[meant].config, isinstance(cell, PtqCell))
    if isinstance(cell, PtqCell):
        if config.recipe == "float" or not config.start:
            raise InputError("PTQ needs a recipe, and a start to quantize")
        return
    config.train.check_length(config.data.length)
    config.blockwise.check(config.recipe, 1)  # On more devices it is refused where they are.
    has_teacher = config.start or config.teacher or config.teacher_cache
    if config.train.needs_teacher and not has_teacher:
        raise InputError(
            f"{config.train.asks_for_teacher} needs a float checkpoint to distil from: start or teacher"
        )


def _check_parent(
    what: str, name: str, config: ExperimentConfig, other: ExperimentConfig, is_ptq: bool
) -> None:
    if other.model != config.model and (what == "start" or is_ptq):
        raise InputError(f"{what} {name} is a {other.model}, not a {config.model}")
    if other.recipe != "float" and (what == "teacher" or is_ptq):
        raise InputError(f"{what} {name} is of recipe {other.recipe}, a float cell expected")


def _found(path: str, what: str, cells: Mapping[str, Cell]) -> None:
    if path in cells:
        return
    if not Path(path).exists():
        close = nearest(path, cells)
        hint = f" (nearest cell: {close})" if close else ""
        raise FileNotFoundError(f"{what} {path}: neither a cell nor a checkpoint{hint}")
    resolve_checkpoint(path)


def _digest(
    cell: Cell, digests: Mapping[str, str], sweep: SweepConfig, *, seedless: bool = False
) -> str:
    config = cell.config
    train = dataclasses.replace(config.train, seed=0) if seedless else config.train
    plain = dataclasses.replace(
        config, name="", directory="", mesh=MeshConfig(), train=train,
        data=dataclasses.replace(config.data, cache=""),
    )  # fmt: skip
    said: dict[str, Any] = encode(plain, ExperimentConfig)
    said["recipe"] = recipe_text(config.recipe)
    for what in ("start", "teacher"):
        meant = _meant(said[what], sweep)
        said[what] = digests.get(meant, meant)
    if isinstance(cell, PtqCell):
        said = {name: said[name] for name in _PTQ_READS}
        said |= {"method": cell.method, "seed": train.seed}
    elif seedless:
        said["method"] = cell.label
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]
