"""Low-rank adapters trained through the grid: the master of a site is w + a b, rounded after the sum.

An adapter that is trained beside a rounded weight and added afterwards leaves the grid, and rounding the sum loses what
was trained. Here the sum is what is rounded, in every step, so merging changes no code: a save holds w + a b as the
master and its codes beside it, like any other, and the factors apart, to go on from.

`a` starts normal with standard deviation R^(-1/2) and `b` at zero, so the first step sees the codes of the start. There
is no further factor (alpha / rank): under Adam it is a learning rate, and the config has one.

Source: LoRA (arXiv 2106.09685); fake quantization of w + a b and not of w alone as in torchao's and Unsloth's QAT.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp

from gemma_qat.errors import InputError, unknown
from gemma_qat.models import ModelConfig, declare
from gemma_qat.models.ahead import ADAPTERS
from gemma_qat.numerics.tiles import split_axes
from gemma_qat.quant.plan import Plans
from gemma_qat.quant.sites import scale_path


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Adapters of `rank` (0: none) at the sites whose checkpoint paths match one of the patterns."""

    rank: int = 0
    sites: tuple[str, ...] = ("layers/*/attn/*", "layers/*/ffn/*")

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise InputError(f"lora.rank={self.rank}: at least 0 expected")


def adapter_shapes(config: ModelConfig, lora: LoraConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns `..._lora_a` and `..._lora_b` of every site of a layer that matches a pattern, by checkpoint path.

    Shapes: a [lead..., R, rank], b [lead..., rank, O], float32, merged axes; none for rank 0.
    Raises: InputError for a pattern that matches no site.
    """
    if not lora.rank:
        return {}
    sites = {p.path: p for p in declare(config).values() if p.is_site and p.layer is not None}
    out = {}
    for pattern in lora.sites:
        found = [path for path in sites if fnmatchcase(path, pattern)]
        if not found:
            raise unknown("lora.sites pattern", pattern, sites)
        for path in found:
            lead, length, trail = split_axes(sites[path].shape, sites[path].reduced)
            for name, shape in zip(
                ADAPTERS, ((length, lora.rank), (lora.rank, math.prod(trail))), strict=True
            ):
                out[scale_path(path, name)] = jax.ShapeDtypeStruct((*lead, *shape), jnp.float32)
    return out


def add_adapters(
    parameters: Mapping[str, Any], config: ModelConfig, lora: LoraConfig, seed: int
) -> dict[str, Any]:
    """Returns parameters by checkpoint path with fresh factors beside every site that matches.

    Raises: InputError for a pattern that matches no site.
    """
    out, root = dict(parameters), jax.random.key(seed)
    for path, shape in adapter_shapes(config, lora).items():
        if path.endswith(ADAPTERS[1]):
            out[path] = jnp.zeros(shape.shape, shape.dtype)
        else:
            key = jax.random.fold_in(root, zlib.crc32(path.encode()))
            draw = jax.random.normal(key, shape.shape, shape.dtype)
            out[path] = draw * shape.shape[-2] ** -0.5
    return out


def is_factor(path: str) -> bool:
    """Returns whether a path is that of a low-rank factor."""
    return path.endswith(tuple(f"_{name}" for name in ADAPTERS))


def adapted_paths(paths: Iterable[str], factors: Iterable[str]) -> list[str]:
    """Returns those of `paths` that have a factor among `factors` beside them."""
    beside = {path.removesuffix(f"_{ADAPTERS[0]}") for path in factors}
    return [
        path for path in paths if path in beside and scale_path(path, ADAPTERS[0]) in set(factors)
    ]


def trained_with(plans: Plans) -> tuple[str, ...]:
    """Returns what trains when adapters do and nothing else was asked for: they, and scales that are learned."""
    learned = any(plan.scales == "learned" for plan in plans.values())
    return ("*_lora_a", "*_lora_b", *(("*_scale",) if learned else ()))
