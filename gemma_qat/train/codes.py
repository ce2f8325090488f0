"""Which codes are used, and how far the grid is from the masters: site by site, layer by layer.

    counts            how many weights have each code, lowest code first
    relative_error    ||w - q|| / ||w||, w the masters and q what their codes stand for
    clipped           share of weights whose code saturates

All of it is summed up where the shards lie; what comes to the host is some numbers a layer, never a code. A count is a
comparison and a sum for every code of the format: 16 passes over the codes at 4 bits, 256 at 8.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_qat.models import Fitted, declare, stacked_sites
from gemma_qat.models.ahead import ADAPTERS, mastered
from gemma_qat.numerics import QArray
from gemma_qat.numerics.formats import FORMATS
from gemma_qat.numerics.tiles import tiled_shape
from gemma_qat.quant.fake import on_grid
from gemma_qat.quant.plan import Plan
from gemma_qat.quant.sites import Parameter, scale_path
from gemma_qat.sharding import replicated
from gemma_qat.train.metrics import Grids, saturated
from gemma_qat.train.state import Student

Figures = dict[str, Any]
"""Of one array in memory: counts uint32 [codes]; of one with masters also float32 `squares` (of the masters) and `off`
(of the difference), and uint32 `clipped`. Where layers are stacked, [L] stands in front of all of them."""


class CodeCounts:
    """Counts the codes of all sites in one jitted program."""

    def __init__(self, student: Student, mesh: Any) -> None:
        sites = stacked_sites(student.config, student.plans)
        self._leading = {path: site.leading for path, site in sites.items()}
        self._count = jax.jit(self._counted, out_shardings=replicated(mesh))

    def count(self, grids: Grids) -> dict[str, dict[str, jax.Array]]:
        """Returns by format and in-memory path how many weights have each code, uint32 [L, codes]; does not wait."""
        return self._count(grids) if grids else {}

    def _counted(self, grids: Grids) -> dict[str, dict[str, jax.Array]]:
        out: dict[str, dict[str, jax.Array]] = {}
        for path, q in grids.items():
            out.setdefault(q.grid.format, {})[path] = _counts(q, self._leading[path])
        return out


def use_by_format(counts: Mapping[str, Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Returns what `CodeCounts.count` gave as int64 [codes] by format, over all sites; waits for the devices."""
    out = {}
    for name, parts in jax.device_get(dict(counts)).items():
        each = [np.asarray(part, np.int64) for part in parts.values()]
        out[name] = np.sum([part.reshape(-1, part.shape[-1]).sum(axis=0) for part in each], axis=0)
    return out


def code_report(
    parameters: Mapping[str, Any], fitted: Fitted, quantized: Mapping[str, QArray] | None = None
) -> dict[str, Any]:
    """Returns the code use and error of every site of a model, by checkpoint path, as values for JSON.

    `parameters` are masters, with their scales where those are stored. With `quantized` (the codes of a packed
    checkpoint) they are the float weights it was made from; a site of which there is none has no error to tell.
    Shapes, units: `codes.json` of docs/training.md.
    """
    student, declared, found = Student.of(fitted), declare(fitted.config), {}
    for path, plan in student.plans.items():
        if quantized is None:
            found[path] = _measuring(None)(
                _family(path, parameters), plan, declared[path].reduced, 0
            )
        else:
            found[path] = _given(parameters.get(path), quantized[path])
    return _report(jax.device_get(found), student)


def code_report_of(leaves: Mapping[str, jax.Array], student: Student, mesh: Any) -> dict[str, Any]:
    """Returns the same of masters as they lie in memory on a mesh; every process of a run calls it."""
    measure, found = _measuring(replicated(mesh)), {}
    for path, site in stacked_sites(student.config, student.plans).items():
        if site.plan is not None:
            found[path] = measure(_family(path, leaves), site.plan, site.reduced, site.leading)
    return _report(student.unstack(jax.device_get(found)), student)


def _family(path: str, leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The master at `path` and what stands beside it, under one name for all sites: equal shapes share a program."""
    names = {"": path} | {name: scale_path(path, name) for name in ("scale", *ADAPTERS)}
    found = {name: leaves[where] for name, where in names.items() if where in leaves}
    return {scale_path("w", name) if name else "w": leaf for name, leaf in found.items()}


@functools.cache
def _measuring(where: Any) -> Any:
    def measure(
        family: dict[str, jax.Array], plan: Plan, reduced: tuple[int, ...], leading: int
    ) -> Figures:
        w = mastered("w", family)
        values, q = on_grid(w, family.get(scale_path("w")), plan, reduced)
        return _figures(w, values, q, leading)

    return jax.jit(measure, static_argnums=(1, 2, 3), out_shardings=where)


@jax.jit
def _given(w: jax.Array | None, q: QArray) -> Figures:
    return {"counts": _counts(q, 0)} if w is None else _figures(w, q.dequantize(), q, 0)


def _figures(w: jax.Array, values: jax.Array, q: QArray, leading: int) -> Figures:
    wide, clipped = w.astype(jnp.float32), saturated(w, q)
    view = tiled_shape(w.shape, q.reduced, q.grid)
    inside = tuple(range(leading, clipped.ndim))
    return {
        "counts": _counts(q, leading),
        "squares": _total(jnp.square(wide).reshape(view), q.reduced[0] + 1, leading),
        "off": _total(jnp.square(wide - values).reshape(view), q.reduced[0] + 1, leading),
        "clipped": jnp.sum(clipped, axis=inside, dtype=jnp.uint32),
    }


def _counts(q: QArray, leading: int) -> jax.Array:
    number, inside = q.grid.number, tuple(range(leading, q.codes.ndim))
    codes = jnp.arange(number.code_min, number.code_max + 1, dtype=jnp.int8)
    found = jax.lax.map(lambda c: jnp.sum(q.codes == c, axis=inside, dtype=jnp.uint32), codes)
    return found.T


def _total(x: jax.Array, tile: int, leading: int) -> jax.Array:
    """Returns the sum over all axes but the leading one: tiles first, then an axis at a time.

    Without the barriers the compiler may join the sums, and one float32 sum of 1e9 squares stands still on the way.
    """
    x = jax.lax.optimization_barrier(jnp.sum(x, axis=tile))
    while x.ndim > leading:
        x = jax.lax.optimization_barrier(jnp.sum(x, axis=-1))
    return x


def _report(by_layer: Mapping[str, Figures], student: Student) -> dict[str, Any]:
    declared, plans = declare(student.config), student.plans
    sites = {path: _row(declared[path], plans[path], by_layer[path]) for path in plans}
    use: dict[str, Any] = {}
    for name in dict.fromkeys(row["format"] for row in sites.values()):
        number = FORMATS[name]
        counts = [row["counts"] for row in sites.values() if row["format"] == name]
        use[name] = {
            "codes": list(range(number.code_min, number.code_max + 1)), "zero": number.zero,
            "counts": np.sum(np.asarray(counts, np.int64), axis=0).tolist(),
        }  # fmt: skip
    return {"kind": "codes", "model": student.config.name, "code_use": use, "sites": sites}


def _row(parameter: Parameter, plan: Plan, found: Figures) -> dict[str, Any]:
    row: dict[str, Any] = {
        "role": parameter.role, "layer": parameter.layer, "format": plan.weight.format,
        "elements": parameter.size, "counts": np.asarray(found["counts"], np.int64).tolist(),
    }  # fmt: skip
    if "off" in found:
        off, squares = float(found["off"]), float(found["squares"])
        row["relative_error"] = math.sqrt(off / squares) if squares else 0.0
        row["clipped"] = int(found["clipped"]) / parameter.size
    return row
