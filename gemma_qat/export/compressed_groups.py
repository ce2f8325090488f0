"""The groups of a compressed-tensors config: which modules are quantized in which way.

{"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "group", "group_size": 32, ...},
 "input_activations": null, "output_activations": null, "format": "pack-quantized"}
"""

from __future__ import annotations

import json
from typing import Any

from gemma_qat.export.artifact import Artifact
from gemma_qat.export.hub_rows import is_table, module_of, patterns
from gemma_qat.models.declare import declare
from gemma_qat.numerics import Grid
from gemma_qat.quant import Activation, Parameter, Plan


def is_plain(grid: Grid, parameter: Parameter) -> bool:
    """Whether codes are stored as int8, unpacked: 8 bits, one scale per row."""
    return grid.number.bits == 8 and group_size(grid, parameter) is None


def group_size(grid: Grid, parameter: Parameter) -> int | None:
    """Returns how many codes of a row share a scale; None when all of them do."""
    if grid.tile is None and parameter.role == "per_layer_embed":
        return parameter.shape[2]
    return grid.tile


def groups_of(artifact: Artifact) -> tuple[list[dict[str, Any]], list[str]]:
    """Returns (groups, ignored modules): every quantized module is in one group, every other linear layer ignored."""
    sites = [p for p in declare(artifact.config).values() if p.is_site]
    everything = {module_of(p) for p in sites}
    members: dict[str, set[str]] = {}
    for parameter in sites:
        if parameter.path in artifact.plans:
            scheme = _scheme(artifact.plans[parameter.path], parameter)
            members.setdefault(json.dumps(scheme), set()).add(module_of(parameter))
    linear = {module_of(p) for p in sites if not is_table(p)}
    left = linear - set().union(*members.values())
    only = [key for key, names in members.items() if names & linear]
    groups = []
    for key, names in members.items():
        targets = [f"re:.*{pattern}" for pattern in patterns(names, everything)]
        if only == [key] and names <= linear:
            targets = ["Linear"]
        groups.append(json.loads(key) | {"targets": targets})
    ignored = [
        pattern.removesuffix("$") if pattern == "lm_head$" else f"re:.*{pattern}"
        for pattern in patterns(left, everything)
    ]
    if artifact.config.ties_head and "lm_head" not in ignored:
        ignored.append("lm_head")  # no site of ours, but a linear layer of torch's
    return groups, ignored


def _scheme(plan: Plan, parameter: Parameter) -> dict[str, Any]:
    size = group_size(plan.weight, parameter)
    return {
        "format": "int-quantized" if is_plain(plan.weight, parameter) else "pack-quantized",
        "weights": _arguments(
            plan.weight.number.bits, "channel" if size is None else "group", group_size=size
        ),
        "input_activations": _activation(plan.input),
        "output_activations": _activation(plan.output),
    }


def _activation(how: Activation | None) -> dict[str, Any] | None:
    if how is None:
        return None
    return _arguments(how.bits, "tensor" if how.is_static else "token", dynamic=not how.is_static)


def _arguments(
    bits: int, strategy: str, *, group_size: int | None = None, dynamic: bool = False
) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": strategy,
        "group_size": group_size,
        "dynamic": dynamic,
    }
