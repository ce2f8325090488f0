"""Packed weights of a checkpoint as the model holds them: stacked, read some at a time, the largest first.

Host memory stays near the weights themselves: layers are let go as soon as their stack is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma_qat.checkpoint.store import nbytes, on_device, packed_arrays, read_arrays, together
from gemma_qat.models import ModelConfig, stack_layers
from gemma_qat.numerics import PackedArray
from gemma_qat.quant import Plans


def read_stacked(
    directory: Path, abstract: Mapping[str, PackedArray], config: ModelConfig, plans: Plans
) -> dict[str, PackedArray]:
    """Returns the packed weights by in-memory path (`groups/...`), on this process's first device.

    Raises: InputError naming the directory when an entry is missing, misshaped or unreadable.
    """
    flat = packed_arrays(abstract)
    # Leaves by layer are their own names here; a stack is the list of those it is made of.
    members = stack_layers({path: path for path in flat}, config, plans, join=list)
    found: dict[str, Any] = {}
    sizes = {path: sum(nbytes(flat[name]) for name in _list(own)) for path, own in members.items()}
    for some in together(dict(sorted(sizes.items(), key=lambda item: -item[1]))):
        names = [name for name in some for name in _list(members[name])]
        arrays = read_arrays(directory, {name: flat[name] for name in names})
        for path in some:
            own = members[path]
            found[path] = on_device(
                [arrays.pop(name) for name in _list(own)], stack=isinstance(own, list)
            )
    out = {}
    for path, member in stack_layers(
        dict(abstract), config, plans, join=lambda parts: parts[0]
    ).items():
        out[path] = PackedArray(
            words=found[f"{path}/words"], scale=found[f"{path}/scale"], grid=member.grid,
            shape=member.shape, reduced=member.reduced,
        )  # fmt: skip
    return out


def _list(names: str | list[str]) -> list[str]:
    return [names] if isinstance(names, str) else names
