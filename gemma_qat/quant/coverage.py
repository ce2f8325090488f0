"""Coverage: one row for every stored array, so that nothing is skipped by silence."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from gemma_qat.quant.plan import Plan, Plans
from gemma_qat.quant.sites import Parameter, scale_path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """What one stored array costs.

    Units: bits are stored bits per weight, scales included; share is of the total bytes.
    """

    site: str
    role: str
    shape: tuple[int, ...]
    format: str
    bits: float
    bytes: float
    share: float = 0.0
    activations: str = ""
    """What is rounded beside the weight: input, output, keys and values."""


def coverage(parameters: Iterable[Parameter], plans: Plans, *, float_bits: int = 16) -> list[Row]:
    """Returns a row per stored array, in declaration order, shares filled in.

    Units: `float_bits` is what an array without a plan is stored in (bfloat16 in the released files).
    """
    rows = [row for parameter in parameters for row in _rows(parameter, plans, float_bits)]
    total = sum(row.bytes for row in rows)
    return [dataclasses.replace(row, share=row.bytes / total) for row in rows]


def _rows(parameter: Parameter, plans: Plans, float_bits: int) -> list[Row]:
    plan = plans.get(parameter.path)
    names = () if plan is None else plan.static_scales
    statics = [
        Row(
            site=scale_path(parameter.path, name),
            role="scalar",
            shape=(1,),
            format="float32",
            bits=32.0,
            bytes=4.0,
        )
        for name in names
    ]
    return [_row(parameter, plan, float_bits), *statics]


def _row(parameter: Parameter, plan: Plan | None, float_bits: int) -> Row:
    name, bits = f"float{float_bits}", float(float_bits)
    if plan is not None:
        length = 1
        for axis in parameter.reduced:
            length *= parameter.shape[axis]
        name, bits = plan.weight.format, plan.weight.bits_per_weight(length)
    return Row(
        site=parameter.path,
        role=parameter.role,
        shape=parameter.shape,
        format=name,
        bits=bits,
        bytes=parameter.size * bits / 8,
        activations="" if plan is None else _activations(plan),
    )


def _activations(plan: Plan) -> str:
    found = {"in": plan.input, "out": plan.output, "kv": plan.cache}
    return ", ".join(f"{name} {how}" for name, how in found.items() if how is not None)


def total_bytes(rows: Iterable[Row], *, leave_out: frozenset[str] = frozenset()) -> float:
    """Returns the bytes of all rows but those whose role is in `leave_out`."""
    return sum((row.bytes for row in rows if row.role not in leave_out), 0.0)


def by_role(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Returns the rows added up by (role, format), largest first: the table that is printed."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.role, row.format, row.activations), []).append(row)
    table: list[dict[str, Any]] = [
        {
            "site": role,
            "format": name,
            "bits": 8 * sum(r.bytes for r in group) / max(1, sum(_elements(r) for r in group)),
            "bytes": sum(r.bytes for r in group),
            "share": sum(r.share for r in group),
            "count": len(group),
            "activations": activations,
        }
        for (role, name, activations), group in groups.items()
    ]
    return sorted(table, key=lambda row: -row["bytes"])


def _elements(row: Row) -> int:
    count = 1
    for length in row.shape:
        count *= length
    return count
