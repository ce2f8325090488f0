"""A bfloat16 checkpoint whose weights lie on a q4_0 lattice, as a checkpoint of codes.

Google's `-qat-q4_0-unquantized` checkpoints are such: what the trainer deployed, rounded to bfloat16. Rounding them to
the grid anew gives other scales in most tiles; here the scales that they were made with are found again
(`numerics/lattice.py`). Sites that the recipe puts on another grid (tables in Q6_K) are rounded to nearest, as the
released GGUF files have them, and said to be.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from gemma_qat.checkpoint.source import Leaf, Source
from gemma_qat.errors import InputError
from gemma_qat.models import declare, fit
from gemma_qat.numerics import Grid, QArray, quantize
from gemma_qat.numerics.lattice import LEVELS, recover, returned

PART = 2**24
"""Elements that are worked on at once."""


@dataclasses.dataclass
class Tally:
    """What was found so far.

    Units: tiles. `fitting`: those whose bits come back; `unique`: by one float16 scale only; `elsewhere`: whose
    extremum is not level -8; `naive`: those that rounding to nearest would have brought back; `rounded`: elements of
    sites on other grids.
    """

    tiles: int = 0
    fitting: int = 0
    unique: int = 0
    elsewhere: int = 0
    naive: int = 0
    rounded: int = 0

    def lines(self) -> Iterator[str]:
        """Yields what there is to say, a line each."""
        if self.tiles:
            share = {
                n: getattr(self, n) / self.tiles
                for n in ("fitting", "naive", "unique", "elsewhere")
            }
            yield (
                f"lattice: {self.fitting:,} of {self.tiles:,} tiles give back their bfloat16 bits "
                f"({share['fitting']:.2%}); rounding to nearest anew: {share['naive']:.2%}"
            )
            yield (
                f"  float16 scale: the only one that fits in {share['unique']:.2%} of tiles, the middle of several in "
                f"the others; extremum at another level than -8 in {share['elsewhere']:.2%}"
            )
        if self.rounded:
            yield f"  {self.rounded:,} weights are on other grids of the recipe: rounded to nearest"


def on_lattice(source: Source, recipe: str, tally: Tally) -> Source:
    """Returns a float checkpoint as one of codes on the grids of `recipe`; `tally` fills as leaves are read.

    Raises: InputError for a quantized source or a recipe with static scales; when a leaf is read, naming the site and
        how many of its tiles no float16 scale gives back.
    """
    if source.recipe is not None:
        raise InputError(
            f"{source.format}: {source.recipe} already; --recover-lattice is for floats"
        )
    fitted = fit(source.config, recipe)
    if any(plan.static_scales for plan in fitted.plans.values()):
        raise InputError(
            f"recipe {recipe} has static scales of activations, which no lattice tells"
        )
    if not any(plan.weight.format == "q4_0" for plan in fitted.plans.values()):
        raise InputError(
            f"recipe {recipe} puts nothing on the q4_0 grid: q4_0 or q4_0_google expected"
        )
    declared = declare(source.config)
    leaves = tuple(
        _leaf(leaf, fitted.plans[leaf.path].weight, declared[leaf.path].reduced, tally)
        if leaf.path in fitted.plans
        else leaf
        for leaf in source.leaves
    )
    return dataclasses.replace(
        source, config=fitted.config, leaves=leaves, recipe=fitted.recipe, plans=fitted.plans
    )


def _leaf(leaf: Leaf, grid: Grid, reduced: tuple[int, ...], tally: Tally) -> Leaf:
    def read() -> QArray:
        w = leaf.read()
        assert not isinstance(w, QArray)
        if grid.format != "q4_0":
            tally.rounded += w.size
            return quantize(jnp.asarray(w), grid, reduced)
        return _recovered(leaf.path, np.asarray(w), grid, reduced, tally)

    return dataclasses.replace(leaf, read=read, dtype=f"int{grid.number.bits}")


def _recovered(
    path: str, w: np.ndarray, grid: Grid, reduced: tuple[int, ...], tally: Tally
) -> QArray:
    found = []
    for part in _parts(w, reduced):
        x = jnp.asarray(part)
        one = recover(x, grid, reduced)
        if not bool(jnp.all(one.fitting > 0)):
            one = recover(x, grid, reduced, LEVELS)
        missing = int(jnp.sum(one.fitting == 0))
        if missing:
            raise InputError(
                f"{path}: {missing} of {one.fitting.size} tiles are on no q4_0 lattice in bfloat16; this is not a "
                "checkpoint trained on that grid, or the recipe leaves this site in float"
            )
        tally.tiles += one.fitting.size
        tally.fitting += int(jnp.sum(returned(x, one.quantized)))
        tally.unique += int(jnp.sum(one.fitting == 1))
        tally.elsewhere += int(jnp.sum(one.level != -8))
        tally.naive += int(jnp.sum(returned(x, quantize(x, grid, reduced))))
        found.append(one.quantized)
    axis = _axis(reduced, w.ndim)
    return dataclasses.replace(
        found[0],
        codes=np.concatenate([np.asarray(q.codes) for q in found], axis),
        scale=np.concatenate([np.asarray(q.scale) for q in found], _scale_axis(axis, reduced)),
    )


def _axis(reduced: tuple[int, ...], rank: int) -> int:
    """The first axis that is not reduced: parts are cut along it, between tiles."""
    return next(axis for axis in range(rank) if axis not in reduced)


def _scale_axis(axis: int, reduced: tuple[int, ...]) -> int:
    return axis if axis < reduced[0] else axis - len(reduced) + 1


def _parts(w: np.ndarray, reduced: tuple[int, ...]) -> Iterator[np.ndarray]:
    axis = _axis(reduced, w.ndim)
    size = max(1, PART // max(1, w.size // w.shape[axis]))
    for start in range(0, w.shape[axis], size):
        yield w[(slice(None),) * axis + (slice(start, start + size),)]
