"""How a model's leaves lie on a mesh: derived from the declarations and the rule table.

This is the one derivation: parameters, scales, optimizer state, teacher, restored checkpoints and packed decoding all
ask here. A quantized axis is only cut at whole tiles (whole super-blocks where scales have two levels),
its scales are cut with it, and packed words are only cut where a word, or a block of the bit layout, ends.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from gemma_qat.models.config import ModelConfig
from gemma_qat.models.declare import declare
from gemma_qat.models.leaves import stack_layers
from gemma_qat.numerics import PackedArray
from gemma_qat.numerics.layouts import layout_named
from gemma_qat.quant import Parameter, Plan, Plans, scale_path
from gemma_qat.sharding import Cut, Placement, cut_of, partition, sharding, spec


def leaf_shardings(
    config: ModelConfig, plans: Plans, mesh: Any, preset: str, *, packed: bool = False
) -> dict[str, Any]:
    """Returns the sharding of every leaf by in-memory path (`groups/...`, leading axis of repeats unsplit).

    `packed`: planned leaves are `PackedArray`s of shardings, one for words and one for scales, and have no scale leaf.
    """
    by_layer = _by_layer(config, plans, mesh, preset, packed)
    stacked = stack_layers(by_layer, config, plans, join=_stacked)
    return {path: _on(mesh, where) for path, where in stacked.items()}


def with_cuts(
    leaves: Mapping[str, Any], config: ModelConfig, plans: Plans, placement: Placement | None
) -> dict[str, Any]:
    """Returns leaves by in-memory path whose packed arrays say how `leaf_shardings` lays their words on the mesh."""
    packed = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, PackedArray)}
    if placement is None or placement.mesh.size == 1 or not packed:
        return {**leaves, **{p: dataclasses.replace(leaf, cut=None) for p, leaf in packed.items()}}
    where = leaf_shardings(config, plans, placement.mesh, placement.preset, packed=True)

    def cut(path: str, leaf: PackedArray) -> Cut:
        stacked = path.startswith("groups/")
        one = where[path].words.spec[1 if stacked else 0 :]
        return cut_of(one, len(leaf.shape) - len(leaf.reduced) + 1, placement)

    return {
        **leaves,
        **{path: dataclasses.replace(leaf, cut=cut(path, leaf)) for path, leaf in packed.items()},
    }


def layer_shardings(
    config: ModelConfig, plans: Plans, mesh: Any, preset: str, *, packed: bool = False
) -> dict[str, Any]:
    """Returns the sharding of every leaf by checkpoint path: slices of `leaf_shardings`."""
    by_layer = _by_layer(config, plans, mesh, preset, packed)
    return {path: _on(mesh, where) for path, where in by_layer.items()}


def _by_layer(
    config: ModelConfig, plans: Plans, mesh: Any, preset: str, packed: bool
) -> dict[str, Any]:
    by_layer: dict[str, Any] = {}
    for path, parameter in declare(config).items():
        plan = plans.get(path)
        if plan is not None and packed:
            by_layer[path] = _packed_specs(parameter, plan, mesh, preset)
        else:
            by_layer[path] = _weight_spec(parameter, plan, mesh, preset)
        if plan is not None and plan.has_scale_leaf and not packed:
            by_layer[scale_path(path)] = _scale_spec(parameter, plan, mesh, preset)
        for name in () if plan is None else plan.static_scales:
            by_layer[scale_path(path, name)] = partition()
    return by_layer


def cut_units(parameter: Parameter, plan: Plan | None, *, packed: bool = False) -> tuple[int, ...]:
    """Returns for each dimension of a parameter the number of elements that must stay together.

    Reduced axes merge into one: only the first may be cut, where a cut of it is a cut between tiles.
    """
    units = [1] * len(parameter.shape)
    if plan is None:
        return tuple(units)
    inner = 1
    for axis in parameter.reduced[1:]:
        inner *= parameter.shape[axis]
        units[axis] = parameter.shape[axis] + 1
    first, number = parameter.reduced[0], plan.weight.number
    whole = parameter.shape[first] * inner
    together = whole if plan.weight.tile is None else plan.weight.tile * number.super_tiles
    if packed:
        together = math.lcm(together, layout_named(number.layout, number.bits).block(number.bits))
    units[first] = math.lcm(together, inner) // inner
    return tuple(units)


def _weight_spec(parameter: Parameter, plan: Plan | None, mesh: Any, preset: str) -> Any:
    return spec(parameter.shape, parameter.axes, cut_units(parameter, plan), mesh, preset)


def _along(parameter: Parameter, where: Any) -> tuple[list[Any], Any, list[Any]]:
    """Returns the cuts of the axes before the reduced ones, of the merged reduced axis, and of those after it."""
    cut = [*where, *(None,) * (len(parameter.shape) - len(where))]
    first, last = parameter.reduced[0], parameter.reduced[-1]
    return cut[:first], cut[first], cut[last + 1 :]


def _scale_spec(parameter: Parameter, plan: Plan, mesh: Any, preset: str) -> Any:
    where = _weight_spec(parameter, plan, mesh, preset)
    lead, reduced, trail = _along(parameter, where)
    return partition(*lead, reduced, *trail)


def _packed_specs(parameter: Parameter, plan: Plan, mesh: Any, preset: str) -> PackedArray:
    units = cut_units(parameter, plan, packed=True)
    where = spec(parameter.shape, parameter.axes, units, mesh, preset)
    lead, reduced, trail = _along(parameter, where)
    both = partition(*lead, *trail, reduced)
    return PackedArray(
        words=both, scale=both, grid=plan.weight, shape=parameter.shape, reduced=parameter.reduced
    )


def _stacked(parts: list[Any]) -> Any:
    first = parts[0]
    if isinstance(first, PackedArray):
        inside = _stacked([first.words])
        return dataclasses.replace(first, words=inside, scale=inside)
    return partition(None, *first)


def _on(mesh: Any, where: Any) -> Any:
    if isinstance(where, PackedArray):
        return dataclasses.replace(
            where, words=sharding(mesh, where.words), scale=sharding(mesh, where.scale)
        )
    return sharding(mesh, where)
