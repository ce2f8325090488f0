"""Leaves by layer, leaves by group: the same arrays under two sets of names.

    outside (checkpoints, recipes)    layers/0/attn/q/kernel, layers/5/attn/q/kernel, ...      one array a layer
    in memory (what a scan runs over)  groups/0/0/attn/q/kernel                                 [repeats, ...]

Both directions are exact. A leaf may be an array, a `PackedArray`, or an abstract shape, sharding included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_qat.models.config import ModelConfig
from gemma_qat.models.declare import declare
from gemma_qat.nn.stack import Group, schedule
from gemma_qat.numerics import scale_shape
from gemma_qat.quant.plan import Plans
from gemma_qat.quant.sites import scale_path
from gemma_qat.sharding import of_slice, of_stack


def groups_of(config: ModelConfig, plans: Plans) -> tuple[Group, ...]:
    """Returns the groups the layers are scanned in."""
    return schedule(config.layer_shapes(), plans)


def _members(groups: Iterable[Group]) -> Iterable[tuple[str, list[str]]]:
    for g, group in enumerate(groups):
        for j in range(len(group.period)):
            layers = [f"layers/{group.layer(r, j)}/" for r in range(group.repeats)]
            yield f"groups/{g}/{j}/", layers


def stack_layers(
    flat: Mapping[str, Any],
    config: ModelConfig,
    plans: Plans,
    join: Callable[..., Any] | None = None,
) -> dict[str, Any]:
    """Returns leaves by layer as leaves by group.

    `join` makes one leaf of a list of equal ones; the default stacks them along a new leading axis.
    """
    join = join or _stack
    out = {path: leaf for path, leaf in flat.items() if not path.startswith("layers/")}
    for prefix, layers in _members(groups_of(config, plans)):
        names = [path[len(layers[0]) :] for path in flat if path.startswith(layers[0])]
        for name in names:
            out[prefix + name] = join([flat[layer + name] for layer in layers])
    return out


def unstack_layers(flat: Mapping[str, Any], config: ModelConfig, plans: Plans) -> dict[str, Any]:
    """Returns leaves by group as leaves by layer."""
    out = {path: leaf for path, leaf in flat.items() if not path.startswith("groups/")}
    for prefix, layers in _members(groups_of(config, plans)):
        for path, leaf in flat.items():
            if path.startswith(prefix):
                for r, layer in enumerate(layers):
                    out[layer + path[len(prefix) :]] = jax.tree.map(
                        lambda x, r=r: _pick(x, r), leaf, is_leaf=_is_abstract
                    )
    return out


def abstract_parameters(
    config: ModelConfig, plans: Plans, dtype: str = "float32"
) -> dict[str, Any]:
    """Returns the shape and dtype of every leaf by checkpoint path, learned scales included; allocates nothing."""
    out: dict[str, Any] = {}
    for path, parameter in declare(config).items():
        out[path] = jax.ShapeDtypeStruct(parameter.shape, jnp.dtype(dtype))
        plan = plans.get(path)
        if plan is not None and plan.has_scale_leaf:
            shape = scale_shape(parameter.shape, parameter.reduced, plan.weight, path)
            out[scale_path(path)] = jax.ShapeDtypeStruct(shape, jnp.float32)
        for name in () if plan is None else plan.static_scales:
            out[scale_path(path, name)] = jax.ShapeDtypeStruct((1,), jnp.float32)
    return out


def static_scale_paths(plans: Plans) -> list[str]:
    """Returns the paths of all static scales of activations, keys and values, each float32 [1]."""
    return [scale_path(path, name) for path, plan in plans.items() for name in plan.static_scales]


def initialize(
    config: ModelConfig, seed: int, where: Mapping[str, Any] | None = None
) -> dict[str, jax.Array]:
    """Returns freshly drawn float32 parameters by checkpoint path; each path has its own stream of the seed.

    With `where` (`layer_shardings`) each is drawn where it lies, the same numbers on any mesh.
    """
    import zlib

    root, where = jax.random.key(seed), where or {}
    out = {}
    for path, parameter in declare(config).items():
        drawn = jax.jit(_drawn, static_argnums=(1, 2), out_shardings=where.get(path))
        key = jax.random.fold_in(root, zlib.crc32(path.encode()))
        # Scaled outside: the compiler would join the factor with one of the draw's own, and round once less.
        out[path] = parameter.init_scale * drawn(key, parameter.shape, parameter.init == "constant")
    return out


def _drawn(key: jax.Array, shape: tuple[int, ...], constant: bool) -> jax.Array:
    return jnp.ones(shape, jnp.float32) if constant else jax.random.normal(key, shape, jnp.float32)


def _is_abstract(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)


def _stack(parts: list[Any]) -> Any:
    def one(*leaves: Any) -> Any:
        if _is_abstract(leaves[0]):
            first = leaves[0]
            where = first.sharding and of_stack(first.sharding)
            shape = (len(leaves), *first.shape)
            return jax.ShapeDtypeStruct(shape, first.dtype, sharding=where)
        if isinstance(leaves[0], np.ndarray):
            return np.stack(leaves)
        return jnp.stack(leaves)

    return jax.tree.map(one, *parts, is_leaf=_is_abstract)


def _pick(leaf: Any, index: int) -> Any:
    if _is_abstract(leaf):
        where = leaf.sharding and of_slice(leaf.sharding)
        return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=where)
    return leaf[index]
