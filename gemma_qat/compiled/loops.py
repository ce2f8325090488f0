"""How often each computation of a compiled program runs: loops multiplied out.

XLA's own cost analysis counts the body of a loop once. A loop's turns are read off four things:

    condition    compare(item k of the loop's tuple, bound), direction=LT
    body         item k of what it returns is item k of what it is given, plus a step
    tuple        item k of what the loop starts from is a constant
    bound        a constant, or another item that the body hands on unchanged

The step matters: `lax.scan` counts by 1, but where the partitioner writes a product as a loop that sends shards around
while it multiplies, one turn does two sends in each direction and the counter goes up by 2. A loop of which one of the
four cannot be read counts once and is reported.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from gemma_qat.compiled.hlo import Computation, Instruction, Module


@dataclasses.dataclass(frozen=True)
class Runs:
    """How often each computation runs in one run of the program.

    `unknown` are the loops of which the number of turns could not be read; what they call counts as if they ran once,
    and is `inexact`.
    """

    times: dict[str, int]
    unknown: tuple[str, ...] = ()
    inexact: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True)
class _Value:
    """An integer as far as it is known: an item of the computation's tuple (None: no item) plus a number."""

    item: int | None
    plus: int


_SAME = {"copy", "bitcast", "convert", "reshape", "copy-done", "copy-start", "opt-barrier"}
"""Instructions that hand an integer on."""

_INTEGERS = {"s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64"}

Known = Mapping[int, int]
"""Items of a loop's tuple that are the same constants on every turn."""


def executed(module: Module) -> Runs:
    """Returns how often each computation runs.

    A loop's condition runs once more than its body; every branch of a conditional counts. Fused computations are not
    listed: a fusion is one instruction.
    """
    times: dict[str, int] = {}
    unknown: list[str] = []
    inexact: set[str] = set()

    def visit(name: str, count: int, known: Known, exact: bool) -> None:
        times[name] = times.get(name, 0) + count
        if not exact:
            inexact.add(name)
        within = module.computations[name]
        for instruction in within.values():
            if instruction.op == "while":
                start = _start(module, within, instruction, known)
                turns = _turns(module, instruction, start)
                if turns is None:
                    unknown.append(instruction.name)
                body, sure = _computation(instruction, "body"), exact and turns is not None
                kept = _unchanged(module, body, start)
                turns = 1 if turns is None else turns
                visit(body, count * turns, kept, sure)
                visit(_computation(instruction, "condition"), count * (turns + 1), kept, sure)
            elif instruction.op != "fusion":
                for called in instruction.called:
                    visit(called, count, {}, exact)

    visit(module.entry, 1, {}, True)
    return Runs(times, tuple(unknown), frozenset(inexact))


def _computation(loop: Instruction, which: str) -> str:
    return (loop.attribute(which) or "").lstrip("%")


def _start(module: Module, within: Computation, loop: Instruction, known: Known) -> Known:
    """Returns the items of a loop's first tuple that are constants."""
    given = within.get(loop.operands[0])
    while given is not None and given.op in _SAME:
        given = within.get(given.operands[0])
    if given is None or given.op != "tuple":
        return {}
    found = {}
    for index, name in enumerate(given.operands):
        value = _fixed(_value(module, within, name), known)
        if value is not None:
            found[index] = value
    return found


def _unchanged(module: Module, body: str, start: Known) -> Known:
    """Returns the items of `start` that the body hands on as they are."""
    within = module.computations[body]
    out = _root(within)
    if out.op != "tuple":
        return {}
    return {
        item: number
        for item, number in start.items()
        if item < len(out.operands)
        and _value(module, within, out.operands[item]) in (_Value(item, 0), _Value(None, number))
    }


def _turns(module: Module, loop: Instruction, start: Known) -> int | None:
    """Returns how often a loop runs its body; None when it is not a counter's."""
    told = re.search(r'"known_trip_count":\s*\{\s*"n":\s*"(\d+)"', loop.attributes)
    if told:
        return int(told.group(1))
    condition, body = (_computation(loop, which) for which in ("condition", "body"))
    asked = _comparison(module, condition)
    if asked is None:
        return None
    left, direction, right = asked
    kept = _unchanged(module, body, start)
    if _fixed(right, kept) is None:
        left, direction, right = right, _TURNED.get(direction, direction), left
    bound, out = _fixed(right, kept), _root(module.computations[body])
    if bound is None or left.item not in start or left.item is None or out.op != "tuple":
        return None
    after = _value(module, module.computations[body], out.operands[left.item])
    if after is None or after.item != left.item or not after.plus:
        return None
    return _count(start[left.item] + left.plus, after.plus, direction, bound)


_TURNED = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}


def _comparison(module: Module, condition: str) -> tuple[_Value, str, _Value] | None:
    """Returns what the condition compares, and how."""
    within = module.computations[condition]
    root, given = _root(within), None
    if root.op == "fusion":
        given = [_value(module, within, name) for name in root.operands]
        within = module.computations[root.called[0]]
        root = _root(within)
    if root.op != "compare":
        return None
    left, right = (_value(module, within, name, given) for name in root.operands)
    direction = root.attribute("direction")
    return None if left is None or right is None or direction is None else (left, direction, right)


def _count(start: int, step: int, direction: str, bound: int) -> int | None:
    """Returns how many of `start`, `start + step`, ... hold against `bound` in a row; None when the loop never ends."""
    if direction in ("GT", "GE"):
        start, step, bound = -start, -step, -bound
    if direction in ("LE", "GE"):
        bound += 1
    if direction == "NE":
        whole, left = divmod(bound - start, step)
        return whole if whole >= 0 and not left else None
    if direction == "EQ" or (step < 0 and start < bound):
        return None
    return max(0, -((start - bound) // step))


def _value(
    module: Module, within: Computation, name: str, given: list[_Value | None] | None = None
) -> _Value | None:
    """Returns an integer of a computation; `given` are a fused computation's parameters."""
    one = within.get(name)
    if one is None or one.shapes[0].dims or one.shapes[0].dtype not in _INTEGERS:
        return None
    if one.op == "constant":
        return _Value(None, int(one.literal)) if re.fullmatch(r"-?\d+", one.literal) else None
    if one.op == "parameter":
        return given[int(one.literal)] if given is not None else None
    if one.op == "get-tuple-element":
        tuple_ = within.get(one.operands[0])
        index = re.search(r"\bindex=(\d+)", one.attributes)
        if tuple_ is not None and tuple_.op == "parameter" and given is None and index is not None:
            return _Value(int(index.group(1)), 0)
        return None
    if one.op in _SAME:
        return _value(module, within, one.operands[0], given)
    if one.op in ("add", "subtract"):
        parts = [_value(module, within, operand, given) for operand in one.operands]
        return _sum(parts[0], parts[1], -1 if one.op == "subtract" else 1)
    if one.op == "fusion":
        inner = [_value(module, within, operand, given) for operand in one.operands]
        inside = module.computations[one.called[0]]
        return _value(module, inside, _root(inside).name, inner)
    return None


def _sum(left: _Value | None, right: _Value | None, sign: int) -> _Value | None:
    if left is None or right is None or (right.item is not None and (sign < 0 or left.item is not None)):  # fmt: skip
        return None
    return _Value(right.item if left.item is None else left.item, left.plus + sign * right.plus)


def _fixed(value: _Value | None, known: Known) -> int | None:
    if value is None or (value.item is not None and value.item not in known):
        return None
    return value.plus + (known[value.item] if value.item is not None else 0)


def _root(within: Computation) -> Instruction:
    return next(one for one in within.values() if one.is_root)
