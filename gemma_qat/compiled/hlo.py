"""Reads the text of a compiled program: computations, instructions, operands and the shapes of their results.

Source: the HLO text format of openxla/xla (`hlo_parser.cc`, `hlo_instruction.cc`), as `compiled.as_text()` has it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Mapping

BITS = {
    "pred": 8, "s1": 1, "u1": 1, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16,
    "s32": 32, "u32": 32, "s64": 64, "u64": 64, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128,
    "f4e2m1fn": 4, "f8e3m4": 8, "f8e4m3": 8, "f8e4m3fn": 8, "f8e4m3b11fnuz": 8, "f8e4m3fnuz": 8, "f8e5m2": 8,
    "f8e5m2fnuz": 8, "f8e8m0fnu": 8,
}  # fmt: skip
"""Bits per element; types without one (tokens, opaque) hold no data."""

_SHAPE = re.compile(r"(\w+)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_NAME = re.compile(r"%([\w.\-]+)")
_COMMENT = re.compile(r"/\*.*?\*/")
_DEVICES = re.compile(r"\b(?:replica_count|num_partitions)=(\d+)")


_CALLS = (
    "calls", "called_computations", "branch_computations", "true_computation", "false_computation",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array of an instruction's result."""

    dtype: str
    dims: tuple[int, ...]
    in_hbm: bool = True
    """False for arrays that the compiler keeps in on-chip memory (memory space S(n))."""

    @property
    def bytes(self) -> float:
        """Bytes without the padding of tiled layouts."""
        return math.prod(self.dims) * BITS.get(self.dtype, 0) / 8

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    op: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    literal: str
    """What stands between the parentheses: operands, or the value of a constant."""
    attributes: str
    is_root: bool

    def attribute(self, name: str) -> str | None:
        """Returns the value of an attribute up to the next comma or space, braces kept whole."""
        found = re.search(rf"\b{name}=(\{{[^}}]*\}}|[^,\s]+)", self.attributes)
        return found.group(1) if found else None

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """Computations that it calls once for each time it runs, loops and reducers aside."""
        if self.op in ("async-update", "async-done"):
            return ()  # they name what `async-start` has called
        names = []
        for key in _CALLS:
            names += _NAME.findall(self.attribute(key) or "")
        if self.op in ("call", "async-start"):
            names += _NAME.findall(self.attribute("to_apply") or "")
        return tuple(names)


Computation = Mapping[str, Instruction]
"""Instructions by name, in order."""


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program; `devices` run it together."""

    computations: Mapping[str, Computation]
    entry: str
    devices: int = 1


def parse(text: str) -> Module:
    """Returns the program of `compiled.as_text()`.

    Raises: ValueError when the text has no entry computation.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    current: dict[str, Instruction] | None = None
    entry, devices = "", 1
    for line in text.splitlines():
        head = _COMPUTATION.match(line)
        if head:
            current = computations.setdefault(head.group(2), {})
            entry = head.group(2) if head.group(1) else entry
        elif line.startswith("HloModule "):
            devices = math.prod(int(count) for count in _DEVICES.findall(line))
        elif current is not None and _INSTRUCTION.match(line):
            instruction = _instruction(_COMMENT.sub("", line))
            current[instruction.name] = instruction
    if not entry:
        raise ValueError("no ENTRY computation: the text of a compiled program expected")
    return Module(computations, entry, devices)


def _instruction(line: str) -> Instruction:
    head = _INSTRUCTION.match(line)
    assert head is not None
    rest = line[head.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    result, rest = rest[:end], rest[end:].lstrip()
    start = rest.index("(")
    stop = _closing(rest, start)
    inner = rest[start + 1 : stop]
    return Instruction(
        name=head.group(2), op=rest[:start], shapes=shapes_of(result), operands=tuple(_NAME.findall(inner)),
        literal=inner, attributes=rest[stop + 1 :], is_root=bool(head.group(1)),
    )  # fmt: skip


def shapes_of(text: str) -> tuple[Shape, ...]:
    """Returns the arrays of a result type, tuples flattened."""
    found = []
    for dtype, dims, layout in _SHAPE.findall(text):
        sizes = tuple(int(re.sub(r"\D", "", n)) for n in dims.split(",") if n)
        found.append(Shape(dtype, sizes, not re.search(r"S\([1-9]\d*\)", layout)))
    return tuple(found)


def _closing(text: str, start: int) -> int:
    """Returns where the parenthesis opened at `start` closes."""
    depth = 0
    for position in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[position], 0)
        if depth == 0:
            return position
    raise ValueError(f"no closing parenthesis: {text[:80]}")
