"""What a compiled program moves between devices: read from its text.

`compiled.as_text()` of a partitioned program names every collective. A `while` loop (a `lax.scan` over layers, say)
runs its body as often as the compiler says (`known_trip_count`, CPU and GPU) or its condition (counter < constant,
from 0 in steps of 1, as a scan is compiled on TPU), so one instruction stands for many messages.

| kind | bytes: the whole message, as one device sees it |
|---|---|
| all-gather | result (shards put together) |
| reduce-scatter | operand (before it is scattered) |
| all-reduce, all-to-all, ragged-all-to-all, collective-permute, collective-broadcast | result |

A ring moves (n - 1) / n of that per device for a gather or a scatter among n, twice that for an all-reduce.

Source: the HLO text format of openxla/xla (`hlo_parser.cc`, `hlo_instruction.cc`);
asynchronous pairs (`-start`, `-done`) count once.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator

KINDS = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all",
    "collective-permute", "collective-broadcast",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction of a compiled program.

    Units: `bytes` per execution and device, see above; `count` executions in one run of the program; `group` devices
    that exchange. `exact` is False where a loop around it has no known trip count (it counts once). `shape` is the
    result as the text has it, `source` the operation of the traced program it was made for.
    """

    kind: str
    bytes: int
    count: int
    group: int
    shape: str
    source: str
    exact: bool = True


def collectives(text: str) -> list[Collective]:
    """Returns every collective that a run of the program executes, loops counted by their trips.

    Raises: ValueError when the text has no entry computation.
    """
    entry, computations = _computations(text)
    found: list[Collective] = []
    todo = [(entry, 1, True)]
    while todo:
        name, count, exact = todo.pop()
        for line in computations.get(name, ()):
            one = _collective(line, count, exact)
            if one is not None and name.startswith("all-reduce-scatter"):
                # How the TPU compiler writes a reduce-scatter: a fusion of an all-reduce and a slice of it.
                one = dataclasses.replace(one, kind="reduce-scatter")
            if one is not None:
                found.append(one)
            trips, known = _trips(line, computations)
            for callee, looped in _callees(line):
                more = trips if looped else 1
                todo.append((callee, count * more, exact and (known or not looped)))
    return found


def summary(found: Iterable[Collective]) -> dict[str, dict[str, int]]:
    """Returns by kind: `instructions`, `count` of executions, and `bytes` over all of them."""
    out: dict[str, dict[str, int]] = {}
    for one in found:
        row = out.setdefault(one.kind, {"instructions": 0, "count": 0, "bytes": 0})
        row["instructions"] += 1
        row["count"] += one.count
        row["bytes"] += one.count * one.bytes
    return dict(sorted(out.items()))


_HEADER = re.compile(r"^\s*(ENTRY\s+)?%?([\w.\-]+)\s*\(.*\)\s*->.*\{\s*$")
_OPERATION = re.compile(rf"\s({'|'.join(sorted(KINDS, key=len, reverse=True))})(-start)?\(")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|branch_computations|called_computations|true_computation|"
    r"false_computation)=(?:\{([^}]*)\}|(%?[\w.\-]+))"
)
_TRIPS = re.compile(r'"known_trip_count":\s*\{\s*"n":\s*"(\d+)"')
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,<= ]*)\]")
_SOURCE = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')


def _computations(text: str) -> tuple[str, dict[str, list[str]]]:
    entry, name = "", ""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header and " = " not in line.split("->")[0]:
            name = header.group(2)
            entry = name if header.group(1) else entry
            found[name] = []
        elif name and " = " in line:
            found[name].append(line)
    if not entry:
        raise ValueError("no ENTRY computation: the text of a compiled program expected")
    return entry, found


def _callees(line: str) -> Iterator[tuple[str, bool]]:
    looped = " while(" in line
    for match in _CALLED.finditer(line):
        for name in (match.group(1) or match.group(2) or "").split(","):
            if name.strip():
                yield name.strip().lstrip("%"), looped


def _trips(line: str, computations: dict[str, list[str]]) -> tuple[int, bool]:
    """Returns how often the body of a loop runs and whether that is known."""
    if " while(" not in line:
        return 1, True
    match = _TRIPS.search(line) or _limit(line, computations)
    return (int(match.group(1)), True) if match else (1, False)


def _limit(line: str, computations: dict[str, list[str]]) -> re.Match[str] | None:
    """Returns the constant that the loop's condition compares its counter with, as it does for a scan."""
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    inside = computations.get(condition.group(1), []) if condition else []
    for root in inside:
        compared = re.search(r"ROOT .*compare\(.*, %?([\w.\-]+)\), direction=LT", root)
        for other in inside if compared else ():
            assert compared is not None
            if re.match(rf"\s*%?{re.escape(compared.group(1))} = ", other):
                return re.search(r"constant\((\d+)\)", other)
    return None


def _collective(line: str, count: int, exact: bool) -> Collective | None:
    _, _, right = line.partition(" = ")
    match = _OPERATION.search(right)
    if match is None or not _is_type(right[: match.start()]):
        return None
    kind, shape = match.group(1), right[: match.start()].strip()
    group = _group(right)
    size = sum(map(_bytes, _ARRAY.finditer(shape)))
    if match.group(2) and kind == "all-gather":  # (operand, result)
        size = size * group // (group + 1)
    elif match.group(2) and kind == "collective-permute":
        size //= 2
    elif kind == "reduce-scatter":
        size *= group
    source = _SOURCE.search(right)
    return Collective(
        kind=kind, bytes=size, count=count, group=group, shape=shape, exact=exact,
        source=source.group(1) if source else "",
    )  # fmt: skip


def _is_type(text: str) -> bool:
    """Whether this is all that stands between `=` and the operation: a type, not an instruction that mentions it."""
    return "%" not in text and text.strip()[:1] in "(abcdefpstu"


def _bytes(match: re.Match[str]) -> int:
    kind, dims = match.groups()
    bits = 8 if kind == "pred" else int((re.search(r"\d+", kind) or ["0"])[0])
    elements = math.prod(int(d.lstrip("<= ")) for d in dims.split(",") if d.strip())
    return elements * bits // 8


def _group(line: str) -> int:
    """Returns the devices of a group, from any of the ways the text lists groups."""
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    if listed:
        return len(listed.group(1).split(","))
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]", line)
    if iota:
        return int(iota.group(2))
    named = re.search(r"replica_groups=@?mesh\S*?\[([^\]]*)\][^{]*\{([^}]*)\}", line)
    if not named:
        return 1
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", named.group(1))}
    parts = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", named.group(2))
    return math.prod(int(part) if part else sizes[name] for name, part in parts)
