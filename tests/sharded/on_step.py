"""The sharded training step against the one on a single device, and what it moves. Run by `eight.py`."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
from twins import MESHES, batch, keep_gradient, model_of, parameters_of

from gemma_qat.compiled import Collective, collectives, parse
from gemma_qat.models import RunOptions, stacked_sites
from gemma_qat.sharding import Placement, make_mesh, partition, replicated, sharding
from gemma_qat.train import code_report
from gemma_qat.train.codes import CodeCounts, _family, _measuring, code_report_of, use_by_format
from gemma_qat.train.distributed import spread
from gemma_qat.train.metrics import GridWatch
from gemma_qat.train.state import Student, start, state_shardings
from gemma_qat.train.step import Fixed, make_step

SHAPES_CHECKED = False
RATE = 0.125
PRESETS = tuple(name for name in MESHES if name != "one")
RECIPES = {
    "dense": ("float", "q4_0"),
    "e_series": ("float", "q4_0", "mobile"),
    "moe": ("float", "q4_0"),
}
CASES = [f"{f} {p} {r}" for f in RECIPES for r in RECIPES[f] for p in PRESETS]


def compiled(
    family: str, preset: str, recipe: str, quantize: Any, fixed: Any = None, **how: Any
) -> tuple[Any, Any]:
    """The compiled step of a twin and its state before the first step; `how` goes to `make_step`."""
    student = Student.of(model_of(family, recipe))
    config = MESHES[preset]
    mesh = make_mesh(config, jax.devices()[: 1 if preset == "one" else 8])
    leaves = student.stack(parameters_of(student.config, student.plans))
    optimizer = keep_gradient(RATE)
    where = state_shardings(student, optimizer, leaves, mesh, config.preset)
    how = {"placement": Placement(mesh, config.preset)} | how
    options = RunOptions(quantize=quantize)
    step = make_step(student, optimizer, where, mesh, loss="ce", options=options, **how)
    state = start(optimizer, leaves, where)
    return step.lower(state, batch(), fixed).compile(), state


def step_of(family: str, preset: str, recipe: str, quantize: Any) -> dict[str, Any]:
    """Loss, gradient and updated parameters of one step, and what was moved."""
    program, state = compiled(family, preset, recipe, quantize)
    state, metrics = program(state, batch(), None)
    moved = collectives(parse(program.as_text()))
    out = {"loss": metrics["loss"], "gradient": state.optimizer, "parameters": state.parameters}
    return jax.tree.map(np.asarray, out) | {"moved": moved}


@functools.cache
def reference(family: str, recipe: str, quantize: Any) -> dict[str, Any]:
    return step_of(family, "one", recipe, quantize)


def hidden(preset: str) -> dict[str, Any]:
    """A step of experts beside a teacher whose states after every layer count."""
    config = MESHES[preset]
    mesh = make_mesh(config, jax.devices()[: 1 if preset == "one" else 8])
    guide = Student.of(model_of("moe", "float"))
    leaves = guide.stack(parameters_of(guide.config, guide.plans))
    # Not the student's: twice the embedding, and everything after it moves.
    other = leaves | {"embed/table": 2 * leaves["embed/table"]}
    fixed = Fixed(teacher=spread(other, guide.shardings(mesh, config.preset)))
    how = {"teacher": guide, "hidden_weight": 4.0, "hidden": "layers"}
    program, state = compiled("moe", preset, "float", "all", fixed, **how)
    state, metrics = program(state, batch(), fixed)
    out = {"loss": metrics["loss"], "gradient": state.optimizer, "parameters": state.parameters}
    moved = collectives(parse(program.as_text()))
    return jax.tree.map(np.asarray, out) | {"moved": moved, "hidden": float(metrics["hidden"])}


def norm(tree: dict[str, np.ndarray]) -> float:
    return float(np.sqrt(sum(np.sum(np.square(x.astype(np.float64))) for x in tree.values())))


def distance(got: dict[str, Any], want: dict[str, Any]) -> dict[str, Any]:
    """How far two steps are apart: loss relative; gradient by leaf, and updated parameters, see `test_step.py`."""
    whole = norm(want["gradient"])
    by_leaf, updated = {}, 0.0
    for path, g in want["gradient"].items():
        off = float(np.abs(got["gradient"][path] - g).max())
        by_leaf[path] = off / (float(np.abs(g).max()) if g.size > g.shape[0] else whole)
        moved = np.abs(got["parameters"][path] - want["parameters"][path])
        updated = max(updated, float(moved.max()) - RATE * off)
    apart = {p: got["gradient"][p] - g for p, g in want["gradient"].items()}
    worst = max(by_leaf, key=lambda path: by_leaf[path])
    return {
        "loss": abs(float(got["loss"] / want["loss"]) - 1), "leaf": by_leaf[worst], "worst": worst,
        "gradient": norm(apart) / whole, "updated": updated,
        "largest": max(float(np.abs(p).max()) for p in want["parameters"].values()),
    }  # fmt: skip


def listed(moved: list[Collective]) -> list[Any]:
    return [[m.kind, " ".join(map(str, m.shapes)), m.count, m.source] for m in moved]


def by_accident(name: str) -> list[Collective]:
    """What the compiler moves when nobody says how: a table as a head, a layer of experts."""
    place = Placement(make_mesh(MESHES["fsdp+expert"]), "fsdp+expert")

    def lies(*axes: Any) -> Any:
        return sharding(place.mesh, partition(*axes))

    if name == "bad table":
        shapes = [
            jax.ShapeDtypeStruct((8, 128), "float32"),
            jax.ShapeDtypeStruct((160, 128), "float32"),
        ]
        cut = (lies(("fsdp", "expert")), lies(("fsdp", "expert")))
        program = jax.jit(lambda x, t: x @ t.T, in_shardings=cut, out_shardings=cut[0])
    else:
        shapes = [jax.ShapeDtypeStruct((64, 128), "float32"), jax.ShapeDtypeStruct((8, 128, 64), "float32"),
                  jax.ShapeDtypeStruct((8,), "int32")]  # fmt: skip
        cut = (lies(("fsdp", "expert")), lies(("expert", "fsdp")), lies())
        program = jax.jit(jax.lax.ragged_dot, in_shardings=cut, out_shardings=cut[0])
    return collectives(parse(program.lower(*shapes).compile().as_text()))


def codes(family: str, preset: str, recipe: str) -> dict[str, Any]:
    """The report of the codes on eight devices and on one, and what counting and measuring them moves."""
    fitted, config = model_of(family, recipe), MESHES[preset]
    student, mesh = Student.of(fitted), make_mesh(config)
    parameters = parameters_of(student.config, student.plans)
    leaves = spread(student.stack(parameters), student.shardings(mesh, config.preset))
    grids, _ = GridWatch(student).look(leaves, None)
    counts, sites = CodeCounts(student, mesh), stacked_sites(student.config, student.plans)
    texts = [counts._count.lower(grids).compile().as_text()]
    for path in ("embed/table", next(path for path in sites if "experts/" in path)):
        given = (_family(path, leaves), sites[path].plan, sites[path].reduced, sites[path].leading)
        texts.append(_measuring(replicated(mesh)).lower(*given).compile().as_text())
    moved = [one for text in texts for one in collectives(parse(text))]
    return {
        "one": code_report(parameters, fitted), "eight": code_report_of(leaves, student, mesh),
        "use": {n: c.tolist() for n, c in use_by_format(counts.count(grids)).items()},
        "largest": max(one.bytes for one in moved), "kinds": sorted({one.kind for one in moved}),
    }  # fmt: skip


def case(name: str) -> dict[str, Any]:
    """Figures of one preset, family and recipe; with activations rounded too where the recipe does."""
    if name == "codes":
        return codes("moe", "fsdp+expert", "q4_0")
    if name == "hidden":
        got = hidden("fsdp+expert")
        return {
            "distance": distance(got, hidden("one")),
            "moved": listed(got["moved"]),
            "hidden": got["hidden"],
        }
    if name.startswith("bad"):
        return {"moved": listed(by_accident(name))}
    family, preset, recipe = name.split()
    want = reference(family, recipe, "weights")
    got = step_of(family, preset, recipe, "weights")
    found: dict[str, Any] = {"distance": distance(got, want), "moved": listed(got["moved"])}
    if recipe == "mobile":
        rounded = reference(family, recipe, "all")
        found["rounding"] = distance(rounded, want)
        found["flips"] = distance(step_of(family, preset, recipe, "all"), rounded)
    return found
