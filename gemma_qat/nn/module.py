"""The one door to Flax NNX for layers: modules, parameters, and taking a module apart.

Layers use `Module`, `Param` and `ModuleList` and nothing else of NNX; `split` and `merge` are for `stack.py`,
which scans over stacked modules, and for `models/gemma4.py`, which jits over a model's leaves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from flax import nnx

Module = nnx.Module
Param = nnx.Param
ModuleList = nnx.List

Leaves = Mapping[str, Any]
"""Nested mapping of names to arrays (or packed arrays, tracers, shape structs)."""


def split(module: nnx.Module) -> tuple[nnx.GraphDef, nnx.State]:
    """Returns the hashable structure of a module and its leaves as a pytree."""
    return nnx.split(module)


def merge(graph: nnx.GraphDef, state: nnx.State) -> Any:
    """Returns the module that `split` took apart, around other leaves."""
    return nnx.merge(graph, state)


def variables(state: nnx.State) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yields (path, variable) of every leaf that `split` took out."""
    yield from nnx.to_flat_state(state)


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `{'a/b': x}` as `{'a': {'b': x}}`."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree
