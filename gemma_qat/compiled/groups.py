"""Which devices exchange in a collective, from any of the ways the text of a program lists them.

    {{0,1},{2,3}}                                            every group by its numbers
    [2,2]<=[4]T(1,0)                                         rows of numbers in order, reshaped and turned round
    mesh['x'=2,'y'=2], device_ids=([2,2]T(1,0)) {'y'}        a mesh and the axes of it that a group runs along

Devices are numbered as the program numbers its partitions: in the order of the mesh it was compiled for.
"""

from __future__ import annotations

import math
import re

import numpy as np


def group_of(attributes: str, devices: int) -> tuple[int, ...]:
    """Returns the first group of devices that exchange; all devices where the text names none."""
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
        r"replica_groups=@?mesh\w*\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", attributes
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
