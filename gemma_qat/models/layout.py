"""How a model's leaves lie on a mesh: derived from the declarations and the rule table.

A quantized axis is only cut at whole tiles, and its scales are cut with it.
"""

from __future__ import annotations

from typing import Any

from gemma_qat.models.config import ModelConfig
from gemma_qat.models.declare import declare
from gemma_qat.models.leaves import stack_layers
from gemma_qat.quant import Parameter, Plan, Plans, scale_path
from gemma_qat.sharding import sharding, spec


def leaf_shardings(config: ModelConfig, plans: Plans, mesh: Any, preset: str) -> dict[str, Any]:
    """Returns the sharding of every leaf by in-memory path (`groups/...`, leading axis of repeats unsplit)."""
    by_layer: dict[str, Any] = {}
    for path, parameter in declare(config).items():
        plan = plans.get(path)
        by_layer[path] = _weight_spec(parameter, plan, mesh, preset)
        if plan is not None and plan.has_scale_leaf:
            by_layer[scale_path(path)] = _scale_spec(parameter, plan, mesh, preset)
        for name in () if plan is None else plan.static_scales:
            by_layer[scale_path(path, name)] = spec((1,), ("one",), (1,), mesh, preset)
    stacked = stack_layers(
        by_layer, config, plans, join=lambda parts: type(parts[0])(None, *parts[0])
    )
    return {path: sharding(mesh, partition) for path, partition in stacked.items()}


def _weight_spec(parameter: Parameter, plan: Plan | None, mesh: Any, preset: str) -> Any:
    units = [1] * len(parameter.shape)
    if plan is not None:
        # Reduced axes merge into one: only the first may be cut, where a cut of it is a cut between tiles.
        inner = 1
        for axis in parameter.reduced[1:]:
            inner *= parameter.shape[axis]
            units[axis] = parameter.shape[axis] + 1
        first = parameter.reduced[0]
        tile = plan.weight.tile or parameter.shape[first] * inner
        units[first] = max(1, tile // inner)
    return spec(parameter.shape, parameter.axes, tuple(units), mesh, preset)


def _scale_spec(parameter: Parameter, plan: Plan, mesh: Any, preset: str) -> Any:
    weight = tuple(_weight_spec(parameter, plan, mesh, preset))
    weight += (None,) * (len(parameter.shape) - len(weight))
    first, last = parameter.reduced[0], parameter.reduced[-1]
    return type(_weight_spec(parameter, plan, mesh, preset))(
        *weight[:first], weight[first], *weight[last + 1 :]
    )
