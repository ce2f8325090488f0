"""Weights made ready before the layers run: rounded once a step, then narrowed to the dtype of activations.

A layer that is handed a float master rounds it where it is used: right, but done again for every microbatch and in
every rematerialized layer, and under FSDP the float32 master is what travels. A training step therefore makes all
weights ready first, on the shards where they lie:

    masters (float32, sharded) --round_ahead--> values (float32) --narrow--> what layers see (bfloat16, gathered so)

The float32 values are never held: the compiler fuses the cast. What is held is the bfloat16 copy that a float step
holds as well. Tables that are only looked up (the per-layer table, an untied embedding) stay as they are, since
rounding the rows that a batch asks for is far cheaper than rounding the table. The router stays in float32.

Adapters: a master with low-rank factors beside it is `w + a b`, rounded after the sum. What is
trained through the grid is therefore what is merged, and merging rounds nothing a second time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gemma_qat.models.config import ModelConfig
from gemma_qat.models.declare import declare
from gemma_qat.models.gemma4 import RunOptions
from gemma_qat.models.leaves import stack_layers
from gemma_qat.numerics import QArray
from gemma_qat.quant.fake import on_grid
from gemma_qat.quant.plan import Plan, Plans
from gemma_qat.quant.rounded import Rounded
from gemma_qat.quant.sites import Parameter, scale_path


@dataclasses.dataclass(frozen=True)
class Stacked:
    """A site as it lies in memory: what one layer's array is, its plan, and how many axes stand in front (0 or 1)."""

    parameter: Parameter
    plan: Plan | None
    leading: int

    @property
    def reduced(self) -> tuple[int, ...]:
        """Reduced axes of the array in memory."""
        return tuple(axis + self.leading for axis in self.parameter.reduced)


def stacked_sites(config: ModelConfig, plans: Plans) -> dict[str, Stacked]:
    """Returns every site by in-memory path (`groups/0/1/attn/q/kernel`)."""
    first = {"join": lambda parts: parts[0]}
    sites = {path: p for path, p in declare(config).items() if p.is_site}
    planned = stack_layers(plans, config, plans, **first)
    return {
        path: Stacked(parameter, planned.get(path), int(path.startswith("groups/")))
        for path, parameter in stack_layers(sites, config, plans, **first).items()
    }


def made_ready(config: ModelConfig, plans: Plans) -> dict[str, Stacked]:
    """Returns the sites that are rounded and narrowed before the layers run: all but tables only looked up."""
    looked_up = {"per_layer/embed/table"} | (set() if config.ties_head else {"embed/table"})
    return {p: s for p, s in stacked_sites(config, plans).items() if p not in looked_up}


ADAPTERS = ("lora_a", "lora_b")
"""What the low-rank factors beside an array are called, after its own name and an underscore."""


def adapted(w: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns w + a b in float32.

    Shapes: w [lead..., reduced..., trail...]; a [lead..., R, rank], b [lead..., rank, O], merged axes.
    """
    product = jnp.matmul(a, b, preferred_element_type=jnp.float32, precision="highest")
    return w.astype(jnp.float32) + product.reshape(w.shape)


def merge_adapters(
    leaves: Mapping[str, jax.Array], config: ModelConfig, plans: Plans
) -> dict[str, jax.Array]:
    """Returns in-memory leaves with every pair of factors added to its master and left out."""
    sites = stacked_sites(config, plans)
    names = {scale_path(path, name) for path in sites for name in ADAPTERS}
    out = {path: leaf for path, leaf in leaves.items() if path not in names}
    return out | {path: mastered(path, leaves) for path in sites if path in leaves}


def mastered(path: str, leaves: Mapping[str, jax.Array]) -> jax.Array:
    """Returns the master at `path`, its low-rank factors added if it has some."""
    factors = [leaves.get(scale_path(path, name)) for name in ADAPTERS]
    if factors[0] is None or factors[1] is None:
        return leaves[path]
    return adapted(leaves[path], factors[0], factors[1])


def round_ahead(
    leaves: Mapping[str, jax.Array],
    config: ModelConfig,
    plans: Plans,
    options: RunOptions,
    strength: jax.Array | None = None,
    held: Collection[str] = (),
) -> tuple[dict[str, jax.Array], dict[str, QArray]]:
    """Returns (leaves with every planned site on its grid and its scale leaf used up, codes of those sites).

    With a `strength` in 0 .. 1 a weight is only so far on its way to the grid: w + strength (rounded - w).

    Differentiable in the first result: straight through to masters, and to learned scales. A path whose master is
    missing is left out, so that a part of the leaves can be made ready alone. Of `held` paths only scales train.
    """
    active = options.active(plans)
    codes: dict[str, QArray] = {}
    out = dict(leaves)
    for path, site in made_ready(config, plans).items():
        if path not in leaves:
            continue
        out[path] = mastered(path, leaves)
        for name in ("scale", *ADAPTERS):
            out.pop(scale_path(path, name), None)
        if site.plan is not None and site.parameter.path in active:
            scale = leaves.get(scale_path(path))
            plan = dataclasses.replace(site.plan, gradient="held") if path in held else site.plan
            rounded, q = on_grid(out[path], scale, plan, site.reduced)
            out[path] = rounded if strength is None else _between(out[path], rounded, strength)
            codes[path] = dataclasses.replace(q, reduced=site.parameter.reduced)
    return out, codes


def _between(w: jax.Array, rounded: jax.Array, strength: jax.Array) -> jax.Array:
    wide = w.astype(jnp.float32)
    return jnp.where(strength >= 1, rounded, wide + strength * (rounded - wide))


def narrow(
    values: Mapping[str, jax.Array], config: ModelConfig, plans: Plans, options: RunOptions
) -> dict[str, jax.Array]:
    """Returns the leaves with every weight that is made ready in the dtype of activations; the router stays float32."""
    sites = made_ready(config, plans)
    out = dict(values)
    for path in sites.keys() & values.keys():
        if sites[path].parameter.role != "router":
            out[path] = values[path].astype(options.dtype)
    return out


def as_leaves(
    values: Mapping[str, jax.Array],
    codes: Mapping[str, QArray],
    config: ModelConfig,
    plans: Plans,
    options: RunOptions,
) -> dict[str, Any]:
    """Returns what the model is built from: `Rounded` where there are codes, kept where integer dots multiply them."""
    sites, active = stacked_sites(config, plans), options.active(plans)
    out: dict[str, Any] = dict(values)
    for path in codes.keys() & values.keys():
        is_integer = active[sites[path].parameter.path].arithmetic == "integer"
        out[path] = Rounded(values[path], codes[path] if is_integer else None)
    return out


def placed(tree: Mapping[str, jax.Array], where: Mapping[str, Any] | None) -> dict[str, jax.Array]:
    """Returns arrays that lie as `where` says by path; as they do without one."""
    if where is None:
        return dict(tree)
    return {path: jax.lax.with_sharding_constraint(x, where[path]) for path, x in tree.items()}


def ready(
    leaves: Mapping[str, jax.Array],
    config: ModelConfig,
    plans: Plans,
    options: RunOptions,
    where: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns leaves made ready in one go, for a model that does not train: a teacher, frozen layers."""
    values, codes = round_ahead(leaves, config, plans, options)
    values = placed(narrow(values, config, plans, options), where)
    return as_leaves(values, codes, config, plans, options)
