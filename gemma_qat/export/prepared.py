"""The same model said in another way, where a format cannot say it as it is; no value changes.

| what | becomes | why |
|---|---|---|
| a quantized embedding that is the head too | two sites, the same codes | a packed tensor is one or the other |
| quantized tables | the values of their codes | few runtimes look up in packed ones |
| static scales of 0 (imported: identity) | no rounding at all | compressed-tensors divides by what it finds |
| keys and values rounded with a scale per token | not rounded, and the card says so | nothing is stored for it |
| no rounding | static scales of 0 | the mobile schema has both scales at every linear layer |
| q4_0, q8_0, ternary | int4 tile 32, int8 tile 32, int2 | compressed-tensors has integers and a scale, nothing else |

Scales of q4_0 keep their sign. A positive scale would need the codes negated, and -8, which every tile of q4_0 has,
has no opposite among -8 .. 7; the value of a code is code * scale either way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from gemma_qat.errors import InputError
from gemma_qat.export.artifact import Artifact
from gemma_qat.export.hub_rows import is_table, on_host
from gemma_qat.models.declare import declare
from gemma_qat.numerics import Grid, QArray
from gemma_qat.quant import Activation, Plan, scale_path

_INTEGERS = ("int2", "int4", "int8")


def untied(artifact: Artifact) -> Artifact:
    """Returns the artifact with a head of its own where a quantized embedding is the head too.

    The head gets the embedding's rounding of activations: it is the one that multiplies.
    """
    if not artifact.config.ties_head or "embed/table" not in artifact.plans:
        return artifact
    plan = artifact.plans["embed/table"]
    table = dataclasses.replace(plan, input=None, output=None, arithmetic="float", backward=None)
    return dataclasses.replace(
        artifact,
        config=dataclasses.replace(artifact.config, ties_head=False),
        plans=artifact.plans | {"embed/table": table, "head/table": plan},
        quantized=artifact.quantized | {"head/table": artifact.quantized["embed/table"]},
        floats=_moved(artifact.floats, plan),
    )


def _moved(floats: dict[str, Any], plan: Plan) -> dict[str, Any]:
    names = {scale_path("embed/table", n): scale_path("head/table", n) for n in plan.static_scales}
    return {names.get(path, path): array for path, array in floats.items()}


def without_identities(artifact: Artifact) -> Artifact:
    """Returns the artifact without the roundings whose static scale is 0.

    Raises: InputError when of a layer's keys and values one is rounded and the other is not.
    """
    plans, floats = dict(artifact.plans), dict(artifact.floats)
    for path, plan in artifact.plans.items():
        zero = [
            n for n in plan.static_scales if float(np.asarray(floats[scale_path(path, n)])[0]) == 0
        ]
        if ("key_cache_scale" in zero) != ("value_cache_scale" in zero):
            raise InputError(
                f"{path}: of keys and values one has a scale of 0 and the other has not"
            )
        changes = {name: None for name in _fields(zero)}
        plans[path] = dataclasses.replace(plan, **changes)  # type: ignore[arg-type]
        for name in zero:
            del floats[scale_path(path, name)]
    return dataclasses.replace(artifact, plans=plans, floats=floats)


@dataclasses.dataclass(frozen=True)
class Values:
    """The values of codes, float32, made when an array is asked for."""

    q: QArray

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return tuple(self.q.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Returns code * scale."""
        del copy
        q = dataclasses.replace(self.q, codes=on_host(self.q.codes), scale=on_host(self.q.scale))
        return np.asarray(_dequantize(q)).astype(dtype or np.float32, copy=False)


_dequantize = jax.jit(QArray.dequantize)


def tables_in_float(artifact: Artifact) -> Artifact:
    """Returns the artifact with the values of the codes in the place of quantized tables that are looked up."""
    declared = declare(artifact.config)
    tables = [path for path in artifact.plans if is_table(declared[path])]
    return dataclasses.replace(
        artifact,
        plans={path: plan for path, plan in artifact.plans.items() if path not in tables},
        quantized={path: q for path, q in artifact.quantized.items() if path not in tables},
        floats=artifact.floats | {path: Values(artifact.quantized[path]) for path in tables},
    )


def without_token_caches(artifact: Artifact) -> Artifact:
    """Returns the artifact without rounding of keys and values that has a scale per token: no format stores that."""
    plans = {
        path: dataclasses.replace(plan, cache=None)
        if plan.cache is not None and not plan.cache.is_static
        else plan
        for path, plan in artifact.plans.items()
    }
    return dataclasses.replace(artifact, plans=plans)


def with_identities(artifact: Artifact, sites: Iterable[str]) -> Artifact:
    """Returns the artifact with a static scale of 0, identity, where inputs and outputs of `sites` are not rounded."""
    plans, floats = dict(artifact.plans), dict(artifact.floats)
    for path in sites:
        plan = plans[path]
        plans[path] = dataclasses.replace(
            plan, input=plan.input or Activation(), output=plan.output or Activation()
        )
        for name in ("input_scale", "output_scale"):
            floats.setdefault(scale_path(path, name), np.zeros(1, np.float32))
    return dataclasses.replace(artifact, plans=plans, floats=floats, imported=True)


def _fields(names: list[str]) -> set[str]:
    of = {"input_scale": "input", "output_scale": "output"}
    return {of.get(name, "cache") for name in names}


def as_integers(artifact: Artifact) -> Artifact:
    """Returns the artifact with every grid an integer one: codes times scale, tile and dtype of scales as they were.

    Raises: InputError for a grid whose values are no integers times a scale, or that has two levels.
    """
    plans, quantized = dict(artifact.plans), dict(artifact.quantized)
    for path, plan in artifact.plans.items():
        grid = plan.weight
        if grid.format in _INTEGERS:
            continue
        plain = _integer_grid(grid, path, artifact.recipe)
        q = artifact.quantized[path]
        codes = (np.asarray(q.codes, np.int16) - round(grid.number.zero)).astype(np.int8)
        plans[path] = dataclasses.replace(plan, weight=plain)
        quantized[path] = QArray(codes=on_host(codes), scale=q.scale, grid=plain, reduced=q.reduced)
    return dataclasses.replace(artifact, plans=plans, quantized=quantized)


def _integer_grid(grid: Grid, path: str, recipe: str) -> Grid:
    fmt = grid.number
    if grid.two_level or fmt.zero % 1 or fmt.bits not in (2, 4, 8):
        raise InputError(
            f"recipe {recipe} has no form here: {path} is {grid.format}, whose values are not integers of 2, 4 or "
            "8 bits times one scale"
        )
    return Grid(
        format=f"int{fmt.bits}", tile=grid.tile, scale_dtype=grid.scale_dtype,
        divisor=2.0 ** (fmt.bits - 1),
    )  # fmt: skip
