"""A float model with some of its weights on a grid, and the others as they were.

Weights that are quantized and nothing else are floats that lie on a grid. So every variant is the float model around
other leaves: one compiled program measures them all, whatever the formats, where a fake-quantized or packed model for
each would be compiled for each. Rounding of activations, keys and values is not part of it.

What is there at a time: the float leaves; copies of those leaves (stacks of layers) in which a variant differs; and the
codes of every site and grid that was asked for, packed, because a site is quantized once for all variants. A variant of
all sites would be a second model: the last one takes the place of the floats, leaf by leaf.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gemma_qat.models import Fitted, Gemma4, ModelConfig, RunOptions, declare
from gemma_qat.models.leaves import stack_layers
from gemma_qat.numerics import Grid, PackedArray, pack
from gemma_qat.ptq import round_to_nearest
from gemma_qat.quant import Plan
from gemma_qat.sharding import Placement

_packed = jax.jit(pack)
_values = jax.jit(PackedArray.dequantize)


@dataclasses.dataclass(kw_only=True)
class Variants:
    """A float model's leaves, by in-memory path, whose sites are put on grids by a method of `ptq`."""

    config: ModelConfig
    options: RunOptions
    placement: Placement | None
    leaves: dict[str, Any]
    method: str
    kept: dict[tuple[str, Grid], PackedArray] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, model: Gemma4, config: ModelConfig, method: str) -> Variants:
        """Returns the variants of a float model, with a head of its own, the same numbers, where `config` has one."""
        leaves = model.leaves()
        if not config.ties_head and "head/table" not in leaves:
            leaves["head/table"] = leaves["embed/table"]
        return cls(
            config=config, options=model.options, placement=model.placement, leaves=leaves,
            method=method,
        )  # fmt: skip

    def on(self, grids: Mapping[str, Grid], *, last: bool = False) -> Gemma4:
        """Returns the float model with the values of sites, by checkpoint path, on those grids.

        The `last` variant lets go of the floats it replaces, as it comes to them.
        Raises: InputError for an unknown method, or a site whose weights are not finite.
        """
        leaves = self.leaves if last else dict(self.leaves)
        for path, layers in self._stacks().items():
            places = [index for index, site in enumerate(layers) if site in grids]
            if places:
                values = [self._site(layers[i], grids[layers[i]], leaves[path], i) for i in places]
                leaves[path] = _with(leaves[path], path, places, values)
        return Gemma4(self.config, leaves, {}, self.options, self.placement)

    def _stacks(self) -> dict[str, list[str]]:
        """Returns checkpoint paths by in-memory path, in the order of the stack."""
        names = {path: path for path in declare(self.config)}
        stacked = stack_layers(names, self.config, {}, join=list)
        return {path: [of] if isinstance(of, str) else of for path, of in stacked.items()}

    def _site(self, path: str, grid: Grid, leaf: Any, index: int) -> jax.Array:
        """Returns the values of one site on a grid."""
        if (path, grid) not in self.kept:
            weight = leaf[index] if _is_stack(path) else leaf
            alone = Fitted(config=self.config, recipe="", plans={path: Plan(weight=grid)})
            codes = round_to_nearest({path: weight}, alone, self.method)
            self.kept[path, grid] = _packed(codes[path])
        return _values(self.kept[path, grid])


def _is_stack(path: str) -> bool:
    return path.startswith(("layers/", "groups/"))


def _with(leaf: Any, path: str, places: list[int], values: list[jax.Array]) -> jax.Array:
    """Returns a leaf with some of its layers, or all of it, other values; it lies where it lay."""
    if _is_stack(path):
        made = leaf.at[jnp.asarray(places)].set(jnp.stack(values).astype(leaf.dtype))
    else:
        made = values[0].astype(leaf.dtype)
    return made if made.sharding == leaf.sharding else jax.device_put(made, leaf.sharding)
