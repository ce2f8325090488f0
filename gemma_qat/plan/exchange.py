"""What a compiled TPU program sends between chips, and how long the wires take.

A message is counted where it is started: the steps and the end of an asynchronous collective repeat it in the text and
move nothing of their own. An all-reduce of which every device keeps one slice (`all-reduce-scatter` fusions) is a
reduce-scatter.

Time of one message of `b` bytes (the whole array, as one device sees it) among n chips, w the bandwidth into a chip
over the links the group has:

    all-gather, reduce-scatter   b (n - 1) / n / w          all-reduce            twice that
    collective-permute           b / link                   all-to-all            max(b / w, b d / (8 link))

w is `link` times two for each dimension of the torus that the group fills and that closes to a ring, times one for a
dimension it fills in part or that does not close. d is the longest such dimension: half of all bytes cross its middle.

Source: jax-ml.github.io/scaling-book, "Sharded matrices and how to multiply them"; latency of single hops is left out.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence

import numpy as np

from gemma_qat.plan.chips import Topology
from gemma_qat.plan.hlo import Computation, Instruction, Module
from gemma_qat.plan.loops import executed

KINDS = (
    "all-gather", "all-reduce", "reduce-scatter", "ragged-all-to-all", "all-to-all", "collective-permute",
)  # fmt: skip
_OPS = {f"{kind}{suffix}": kind for kind in KINDS for suffix in ("", "-start")}


@dataclasses.dataclass(frozen=True)
class Exchange:
    """One collective of a program.

    Units: bytes of the whole message as one device sees it, per run of it; `count` runs in one step; `group` the
    devices (numbers) that exchange. `source` names the traced operation.
    """

    kind: str
    bytes: float
    count: int
    group: tuple[int, ...]
    source: str

    def seconds(self, topology: Topology, coordinates: Sequence[tuple[int, ...]]) -> float:
        """Returns how long one run takes on the wires."""
        n = len(self.group)
        if n < 2:
            return 0.0
        spans = _spans(topology, [coordinates[i] for i in self.group])
        link = topology.chip.link
        into = link * sum(links for _, links in spans)
        if self.kind == "collective-permute":
            return self.bytes / link
        if self.kind.endswith("all-to-all"):
            return max(self.bytes / into, self.bytes * max(d for d, _ in spans) / (8 * link))
        rounds = 2 if self.kind == "all-reduce" else 1
        return rounds * self.bytes * (n - 1) / n / into


def _spans(topology: Topology, places: list[tuple[int, ...]]) -> list[tuple[int, int]]:
    """Returns, for each torus dimension a group spreads over, (its extent, links per chip)."""
    found = []
    for axis, length in enumerate(topology.shape):
        extent = len({place[axis] for place in places})
        if extent > 1:
            is_ring = extent == length and topology.chip.closes(length)
            found.append((extent, 2 if is_ring else 1))
    return found or [(1, 1)]


def exchanges(module: Module, devices: int) -> list[Exchange]:
    """Returns every collective that a run of the program executes, loops counted by their turns."""
    times, _ = executed(module)
    return [
        _exchange(one, kind, count, devices)
        for name, count in times.items()
        for one, kind in _started(module, module.computations[name])
    ]


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


def _exchange(one: Instruction, kind: str, count: int, devices: int) -> Exchange:
    group = group_of(one.attributes, devices)
    shapes = one.shapes
    if one.op.endswith("-start") and len(shapes) > 1:  # (operands, results)
        shapes = shapes[len(shapes) // 2 :] if kind != "collective-permute" else shapes[1:2]
    size = sum((shape.bytes for shape in shapes), 0.0)
    if one.op.startswith("reduce-scatter"):
        size *= len(group)  # its result is a shard
    source = re.search(r'op_name="([^"]*)"', one.attributes)
    return Exchange(kind, size, count, group, source.group(1) if source else "")


def group_of(attributes: str, devices: int) -> tuple[int, ...]:
    """Returns the first group of devices that exchange; all devices where the text names none.

    Source: the three ways XLA writes them: `{{0,1},{2,3}}`, `[2,2]<=[4]T(1,0)`, `mesh['x'=2,'y'=2] {'y'}`.
    """
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}", attributes)
    if listed:
        return tuple(int(n) for n in listed.group(1).split(","))
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if iota:
        shape, order = _numbers(iota.group(2)), _numbers(iota.group(3) or "")
        numbers = np.arange(math.prod(shape)).reshape(shape)
        numbers = numbers.transpose(order) if order else numbers
        return tuple(int(n) for n in numbers.reshape(_numbers(iota.group(1)))[0])
    named = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", attributes
    )
    if named:
        return _along(named.group(1), named.group(2), named.group(3))
    return tuple(range(devices))


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]


def _along(mesh: str, order: str | None, over: str) -> tuple[int, ...]:
    """The devices of a named mesh that differ from its first along `over`: whole axes, or parts `'x':(before)size`.

    `order` is how the devices lie in the mesh: `[2,32]T(1,0)`, a list of numbers, or None for 0, 1, 2 ...
    """
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh)}
    numbers = np.arange(math.prod(sizes.values()))
    iota = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", order or "")
    if iota:
        numbers = numbers.reshape(_numbers(iota.group(1)))
        numbers = numbers.transpose(_numbers(iota.group(2))) if iota.group(2) else numbers
    elif order:
        numbers = np.asarray(_numbers(order))
    numbers = numbers.reshape(list(sizes.values()))
    picks = {name: slice(0, 1) for name in sizes}
    for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", over):
        step = sizes[name] // (int(before) * int(size)) if size else 1
        picks[name] = slice(0, int(size) * step if size else None, step)
    return tuple(int(n) for n in numbers[tuple(picks.values())].reshape(-1))
