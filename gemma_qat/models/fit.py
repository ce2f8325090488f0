"""A recipe meets a model: the plans, the codes, and the packed form of its parameters."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gemma_qat.models.config import ModelConfig
from gemma_qat.models.declare import declare
from gemma_qat.models.gemma4 import Gemma4, RunOptions
from gemma_qat.numerics import QArray, pack, quantize
from gemma_qat.quant import Plan, Plans, ScaleMode, recipe_named, resolve, scale_path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fitted:
    """A model's config as a recipe wants it (head tied or not) and the plan of every quantized site."""

    config: ModelConfig
    recipe: str
    plans: Plans

    def adopt(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Returns parameters with a head of their own where the recipe stores one: a copy of the embedding."""
        out = dict(parameters)
        if not self.config.ties_head and "head/table" not in out:
            out["head/table"] = out["embed/table"]
        return out


def fit(config: ModelConfig, recipe: str, scales: ScaleMode = "recomputed") -> Fitted:
    """Returns `recipe` resolved against every site `config` declares.

    Raises: InputError as `quant.resolve` does.
    """
    rules = recipe_named(recipe, config.family)
    if rules.unties_head:
        config = dataclasses.replace(config, ties_head=False)
    plans = resolve(rules, declare(config).values(), family=config.family, scales=scales)
    return Fitted(config=config, recipe=recipe, plans=plans)


def quantize_parameters(parameters: Mapping[str, Any], fitted: Fitted) -> dict[str, QArray]:
    """Returns the codes and scales of every planned site, by the training quantizer, jitted.

    Masters with learned scales bring them along (`.../kernel_scale`); the others have theirs recomputed.
    Exactness: the same function of the same arrays that the training forward evaluates, so the codes are the ones
    training sees.
    """
    leaves = {p: parameters[p] for p in fitted.plans}
    given = [scale_path(p) for p, plan in fitted.plans.items() if plan.has_scale_leaf]
    scales = {p: parameters[p] for p in given}
    return _quantize(tuple(sorted(fitted.plans.items())), fitted.config, leaves, scales)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _quantize(
    plans: tuple[tuple[str, Plan], ...],
    config: ModelConfig,
    leaves: dict[str, jax.Array],
    scales: dict[str, jax.Array],
) -> dict[str, QArray]:
    declared = declare(config)
    return {
        path: quantize(
            leaves[path], plan.weight, declared[path].reduced, scales.get(scale_path(path)), path
        )
        for path, plan in plans
    }


def float_parameters(parameters: Mapping[str, Any], fitted: Fitted) -> dict[str, Any]:
    """Returns the parameters that stay in float: those without a plan, learned scales left out."""
    declared = declare(fitted.config)
    return {path: parameters[path] for path in declared if path not in fitted.plans}


def packed_model(
    quantized: Mapping[str, QArray],
    floats: Mapping[str, Any],
    fitted: Fitted,
    options: RunOptions = RunOptions(),
) -> Gemma4:
    """Returns the model whose sites are packed arrays; it decodes them and never sees the masters."""
    leaves: dict[str, Any] = {path: jnp.asarray(leaf) for path, leaf in floats.items()}
    packing = jax.jit(pack)
    leaves |= {path: packing(q) for path, q in quantized.items()}
    return Gemma4.from_parameters(fitted.config, leaves, fitted.plans, options)
