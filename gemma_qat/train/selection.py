"""What trains and what stays: patterns over checkpoint paths, as masks over leaves in memory.

`train.only=("*_scale",)` trains scales alone, `("layers/3?/*",)` some layers, `("*_lora_a", "*_lora_b")` adapters.
Layers that lie in one stacked leaf may differ: then the leaf trains and the update of the others is zero. A site of
which no part trains cannot change its codes; it is made ready once, before the first step, and never rounded again.
Where scales train and their masters do not, the masters are held (`held_sites`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_qat.errors import unknown
from gemma_qat.models import ModelConfig, made_ready, stack_layers, unstack_layers
from gemma_qat.models.ahead import ADAPTERS
from gemma_qat.quant.plan import Plans
from gemma_qat.quant.sites import scale_path


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which leaves train, by in-memory path: whole ones, parts of stacked ones, and those that stay as they are.

    Shapes: `parts` bool [repeats], True where the layer trains.
    """

    everything: bool = True
    whole: frozenset[str] = frozenset()
    parts: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    still: frozenset[str] = frozenset()
    """Leaves that nothing moves and that belong to no site with a moving part: made ready once."""

    def of(self, leaves: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the leaves that have gradients and optimizer state."""
        trains = leaves.keys() if self.everything else self.whole | self.parts.keys()
        return {path: leaf for path, leaf in leaves.items() if path in trains}

    def masked(self, updates: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Returns updates (or gradients) with those of layers that do not train set to zero."""
        out = dict(updates)
        for path, mask in self.parts.items():
            x = out[path]
            shape = (len(mask),) + (1,) * (x.ndim - 1)
            out[path] = jnp.where(mask.reshape(shape), x, jnp.zeros((), x.dtype))
        return out


EVERYTHING = Selection()


def select(
    only: Sequence[str], paths: Iterable[str], config: ModelConfig, plans: Plans
) -> Selection:
    """Returns what the patterns `only` (shell style, over checkpoint paths) choose of in-memory `paths`; none: all.

    Raises: InputError for a pattern that matches nothing.
    """
    paths = list(paths)
    if not only:
        return EVERYTHING
    names = _by_layer(paths, config, plans)
    for pattern in only:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise unknown("train.only pattern", pattern, names)
    chosen = {name: np.asarray([any(fnmatchcase(name, p) for p in only)]) for name in names}
    masks = stack_layers(chosen, config, plans, join=np.concatenate)
    whole = frozenset(path for path in paths if masks[path].all())
    parts = {p: masks[p] for p in paths if masks[p].any() and p not in whole}
    moving = {path for path in paths if masks[path].any()}
    sites = made_ready(config, plans)
    for path in sites:
        family = {path, *(scale_path(path, name) for name in ("scale", *ADAPTERS))}
        moving |= family if family & moving else set()
    return Selection(False, whole, parts, frozenset(paths) - moving)


def held_sites(selection: Selection, paths: Iterable[str]) -> frozenset[str]:
    """Returns the in-memory paths of sites whose scales train while nothing moves their weights."""
    if selection.everything:
        return frozenset()
    moving = selection.whole | selection.parts.keys()
    return frozenset(
        path
        for path in paths
        if scale_path(path) in moving
        and not {path, *(scale_path(path, name) for name in ADAPTERS)} & moving
    )


def held_paths(
    selection: Selection, paths: Iterable[str], config: ModelConfig, plans: Plans
) -> list[str]:
    """Returns the checkpoint paths of `held_sites`."""
    return _by_layer(held_sites(selection, paths), config, plans)


def _by_layer(paths: Iterable[str], config: ModelConfig, plans: Plans) -> list[str]:
    """Checkpoint paths behind in-memory ones."""
    places = {path: _Anywhere() for path in paths}
    return list(unstack_layers(places, config, plans))


class _Anywhere:
    """Stands for a stacked leaf of which only the path matters."""

    def __getitem__(self, index: Any) -> _Anywhere:
        return self
