"""What a compiled program moves between devices.

A `while` loop (a `lax.scan` over layers, say) runs its body as often as `loops.py` finds, so one instruction stands for
many messages. A message is counted where it is started: the steps and the end of an asynchronous collective repeat it
in the text and move nothing of their own. An all-reduce of which every device keeps one slice (`all-reduce-scatter`
fusions, as the TPU compiler writes them) is a reduce-scatter.

| kind | bytes: the whole message, as one device sees it |
|---|---|
| all-gather | result (shards put together) |
| reduce-scatter | operand (before it is scattered) |
| all-reduce, all-to-all, ragged-all-to-all, collective-permute, collective-broadcast | result |

A ring moves (n - 1) / n of that per device for a gather or a scatter among n, twice that for an all-reduce.

Source: the HLO text of openxla/xla (`hlo_instruction.cc`). CPU programs hold plain collectives; GPU ones pairs of
`-start` and `-done`; TPU ones both, and fusions that start a collective, go on with it beside other work, and end it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from gemma_qat.compiled.groups import group_of
from gemma_qat.compiled.hlo import Computation, Instruction, Module, Shape
from gemma_qat.compiled.loops import executed

KINDS = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all",
    "collective-permute", "collective-broadcast",
)  # fmt: skip

_OPS = {f"{kind}{suffix}": kind for kind in KINDS for suffix in ("", "-start")}
_SOURCE = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True, kw_only=True)
class Collective:
    """One collective of a program.

    Units: `bytes` of the whole message as one device sees it, per execution; `count` executions in one run of the
    program; `group` the devices (numbers) that exchange. `shapes` are the arrays of the instruction's result, `source`
    the operation of the traced program it was made for. `exact` is False where a loop around it has no known number of
    turns (it counts once).
    """

    kind: str
    bytes: int
    count: int
    group: tuple[int, ...]
    shapes: tuple[Shape, ...] = ()
    source: str = ""
    exact: bool = True


def collectives(module: Module) -> list[Collective]:
    """Returns every collective that a run of the program executes, loops counted by their turns."""
    runs = executed(module)
    return [
        _collective(one, kind, count, module.devices, name not in runs.inexact)
        for name, count in runs.times.items()
        for one, kind in _started(module, module.computations[name])
    ]


def summary(found: Iterable[Collective]) -> dict[str, dict[str, float]]:
    """Returns by kind: `count` of executions, and `bytes` over all of them."""
    out: dict[str, dict[str, float]] = {}
    for one in found:
        row = out.setdefault(one.kind, {"count": 0.0, "bytes": 0.0})
        row["count"] += one.count
        row["bytes"] += one.count * one.bytes
    return dict(sorted(out.items()))


def _started(module: Module, computation: Computation) -> Iterator[tuple[Instruction, str]]:
    for instruction in computation.values():
        if instruction.op in _OPS:
            yield instruction, _OPS[instruction.op]
        elif instruction.op == "fusion":
            inside = module.computations[instruction.called[0]]
            if _continues(instruction, inside):
                continue
            scatters = instruction.called[0].startswith("all-reduce-scatter")
            for one, kind in _started(module, inside):
                yield one, "reduce-scatter" if scatters else kind


def _continues(fusion: Instruction, inside: Computation) -> bool:
    """Whether a fusion is a later step of a collective that another one started."""
    ends = any("AsyncCollectiveDone" in one.attributes for one in inside.values())
    return ends or fusion.called[0].startswith("async_collective_fusion")


def _collective(one: Instruction, kind: str, count: int, devices: int, exact: bool) -> Collective:
    group, shapes = group_of(one.attributes, devices), _result(one, kind)
    size = sum(shape.bytes for shape in shapes)
    if one.op.startswith("reduce-scatter"):
        size *= len(group)  # its result is a shard
    source = _SOURCE.search(one.attributes)
    return Collective(
        kind=kind, bytes=math.ceil(size), count=count, group=group, shapes=shapes,
        source=source.group(1) if source else "", exact=exact,
    )  # fmt: skip


def _result(one: Instruction, kind: str) -> tuple[Shape, ...]:
    """The arrays of a collective's result. What starts one has (operands, results, context) where it says operands."""
    given = len(one.operands)
    if not one.op.endswith("-start") or len(one.shapes) <= given:
        return one.shapes
    results = (
        1 if kind == "ragged-all-to-all" else given
    )  # its other operands are offsets and sizes
    return one.shapes[given : given + results]
