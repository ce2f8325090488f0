"""A recipe meets a model: the plans, the codes, and the packed form of its parameters."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gemma_qat.errors import InputError, unknown
from gemma_qat.kernels.tpu_layouts import laid_out
from gemma_qat.models.config import ModelConfig
from gemma_qat.models.declare import declare
from gemma_qat.models.gemma4 import Gemma4, RunOptions
from gemma_qat.models.leaves import static_scale_paths, unstack_layers
from gemma_qat.models.sizes import SIZES
from gemma_qat.numerics import PackedArray, QArray, pack, quantize
from gemma_qat.quant import (
    Plan,
    Plans,
    Recipe,
    ScaleMode,
    recipe_named,
    resolve,
    scale_path,
)
from gemma_qat.quant.plan import Gradient, summing_codes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fitted:
    """A model's config as a recipe wants it (head tied or not) and the plan of every quantized site."""

    config: ModelConfig
    recipe: str
    plans: Plans
    imported: bool = False
    """Whether it started elsewhere: a static scale of 0 then means identity, not a site that was forgotten."""

    def adopt(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Returns parameters with what the recipe stores and a float checkpoint has not.

        A head of its own: a copy of the embedding. Static scales: 0, not calibrated.
        """
        out = dict(parameters)
        if not self.config.ties_head and "head/table" not in out:
            out["head/table"] = out["embed/table"]
        zeros = {path: jnp.zeros(1, jnp.float32) for path in static_scale_paths(self.plans)}
        return zeros | out


def fit(
    config: ModelConfig,
    recipe: str | Recipe,
    scales: ScaleMode = "recomputed",
    *,
    gradient: Gradient = "clipped",
    learn_activations: bool = False,
) -> Fitted:
    """Returns a recipe (by name, by the path of its JSON file, or itself) resolved against every site of `config`.

    `learn_activations` lets static scales of activations train on after calibration.
    Raises: InputError as `quant.resolve` does.
    """
    rules = recipe if isinstance(recipe, Recipe) else recipe_named(recipe, config.family)
    _refuse_unknown_sizes(rules, config)
    if rules.unties_head:
        config = dataclasses.replace(config, ties_head=False)
    plans = resolve(
        rules, declare(config).values(), family=config.family, size=config.name, scales=scales,
        gradient=gradient, learn_activations=learn_activations,
    )  # fmt: skip
    return Fitted(config=config, recipe=rules.name, plans=plans)


def _refuse_unknown_sizes(recipe: Recipe, config: ModelConfig) -> None:
    known = [name for name in SIZES if not name.startswith("tiny_")]
    for rule in recipe.rules:
        for size in sorted(rule.sizes or ()):
            if size not in (*known, config.name):
                raise unknown(f"size in a rule of recipe {recipe.name}", size, known)


def uncalibrated(parameters: Mapping[str, Any], plans: Plans) -> list[str]:
    """Returns the paths of static scales that are 0: there, activations pass unrounded.

    Raises: InputError naming a static scale that is negative, infinite or nan.
    """
    values = {path: float(parameters[path][0]) for path in static_scale_paths(plans)}
    for path, value in values.items():
        if not 0 <= value < math.inf:
            raise InputError(f"{path}: static scale {value}, a finite one of at least 0 expected")
    return [path for path, value in values.items() if value == 0]


def check_integer_sums(model: Gemma4, name: str) -> None:
    """Refuses a model that has no int32 sums of codes to make, or scales for them that were never calibrated.

    Raises: InputError naming the model, and the first scale that is not calibrated.
    """
    plans = dict(model.plans)
    summed = {path for path, plan in summing_codes(plans).items() if plan.arithmetic == "packed"}
    if not any(isinstance(leaf, PackedArray) for leaf in model.leaves().values()) or not summed:
        raise InputError(
            f"{name}: no packed weight whose input has a static scale; integer sums are for packed exports "
            "of recipes such as mobile and mobile_like"
        )
    small = {p: leaf for p, leaf in model.leaves().items() if not isinstance(leaf, PackedArray)}
    leaves = unstack_layers(small, model.config, plans)
    missing = uncalibrated(leaves, {path: plans[path] for path in summed})
    if missing:
        raise InputError(
            f"{name}: {missing[0]} and {len(missing) - 1} more static scales are not calibrated"
        )


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
    """Returns what a packed model keeps in float: parameters without a plan, and static scales of activations."""
    kept = [path for path in declare(fitted.config) if path not in fitted.plans]
    return {path: parameters[path] for path in (*kept, *static_scale_paths(fitted.plans))}


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


def laid_for_kernels(model: Gemma4) -> Gemma4:
    """Returns the model with packed weights laid as kernels read them, where that is not how XLA would lay them."""
    leaves = model.leaves()
    packed = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, PackedArray)}
    if jax.default_backend() != "tpu" or not packed:
        return model
    for path, leaf in packed.items():
        leaves[path] = laid_out(leaf)
    return Gemma4(model.config, leaves, dict(model.plans), model.options, model.placement)
