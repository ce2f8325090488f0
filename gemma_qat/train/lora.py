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
import zlib
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp

from gemma_qat.errors import InputError, unknown
from gemma_qat.models import ModelConfig, declare
from gemma_qat.models.ahead import ADAPTERS
from gemma_qat.numerics.tiles import split_axes
from gemma_qat.quant.sites import scale_path


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Adapters of `rank` (0: none) at the sites whose checkpoint paths match one of the patterns."""

    rank: int = 0
    sites: tuple[str, ...] = ("layers/*/attn/*", "layers/*/ffn/*")

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise InputError(f"lora.rank={self.rank}: at least 0 expected")


def add_adapters(
    parameters: Mapping[str, Any], config: ModelConfig, lora: LoraConfig, seed: int
) -> dict[str, Any]:
    """Returns parameters by checkpoint path with `..._lora_a` and `..._lora_b` beside every site that matches.

    Shapes: a [lead..., R, rank], b [lead..., rank, O], float32, merged axes.
    Raises: InputError for a pattern that matches no site.
    """
    if not lora.rank:
        return dict(parameters)
    sites = [p for p in declare(config).values() if p.is_site and p.layer is not None]
    for pattern in lora.sites:
        if not any(fnmatchcase(site.path, pattern) for site in sites):
            raise unknown("lora.sites pattern", pattern, [site.path for site in sites])
    out, root = dict(parameters), jax.random.key(seed)
    for site in sites:
        if not any(fnmatchcase(site.path, pattern) for pattern in lora.sites):
            continue
        lead, length, trail = split_axes(site.shape, site.reduced)
        width = 1
        for n in trail:
            width *= n
        key = jax.random.fold_in(root, zlib.crc32(site.path.encode()))
        a = jax.random.normal(key, (*lead, length, lora.rank), jnp.float32) * length**-0.5
        out[scale_path(site.path, ADAPTERS[0])] = a
        out[scale_path(site.path, ADAPTERS[1])] = jnp.zeros((*lead, lora.rank, width), jnp.float32)
    return out


TRAINED = ("*_lora_a", "*_lora_b")
"""What trains when adapters do and nothing else was asked for."""
