"""A model with experts, a layer at a time, whose tokens go where they are told: routing apart from everything else.

    free      every layer routes by its own router, as the model does
    set       the experts are those of another run, their weights are the router's own probabilities of them
    whole     experts and their weights are those of another run

Source of the routing: `nn/moe.py`, whose router's lines `Told` repeats around another choice.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gemma_qat.models import Gemma4
from gemma_qat.models.layerwise import Layerwise
from gemma_qat.nn.attention import Context
from gemma_qat.nn.block import Block
from gemma_qat.nn.contract import contract
from gemma_qat.nn.module import nest
from gemma_qat.nn.moe import Router
from gemma_qat.nn.norms import rms
from gemma_qat.nn.shapes import LayerShape
from gemma_qat.nn.taps import Taps
from gemma_qat.quant.plan import Plan

Mode = Literal["free", "set", "whole"]
Routing = list[tuple[jax.Array, jax.Array]]
"""Of every layer the experts of each token, int32 [B, T, X], and their weights, float32 [B, T, X]."""


class Told(Router):
    """A router that is told the experts, and with mode "whole" their weights."""

    def __init__(self, inner: Router, mode: Mode, routing: tuple[jax.Array, jax.Array]) -> None:
        self.__dict__.update(inner.__dict__)
        self.told = lambda: (mode, *routing)

    def __call__(
        self, x: Float[Array, "B T D"], taps: Taps | None = None
    ) -> tuple[Int[Array, "B T X"], Float[Array, "B T X"]]:
        """Returns (experts, weights) as told."""
        mode, experts, weights = self.told()
        if mode == "whole":
            return experts, weights
        scale = self.scale.get_value().astype(jnp.float32) * x.shape[-1] ** -0.5
        r = rms(x.astype(jnp.float32), self.eps) * scale[None, None, :]
        probabilities = jax.nn.softmax(contract("BTD,DE->BTE", r, self.proj), axis=-1)
        top = jnp.take_along_axis(probabilities, experts, axis=-1)
        own = self.per_expert_scale.get_value().astype(jnp.float32)
        return experts, top / jnp.sum(top, axis=-1, keepdims=True) * jnp.take(own, experts)


def routed(
    model: Gemma4,
    batch: Mapping[str, Any],
    mode: Mode = "free",
    routing: Routing | None = None,
) -> tuple[jax.Array, Routing]:
    """Returns (final hidden states [B, T, D], where every layer's own router would have sent its tokens).

    With a mode other than "free" tokens go where `routing` says, and what is returned is what was said.
    """
    config, plans = model.config, dict(model.plans)
    walk = Layerwise(config, plans, model.options)
    parameters = model.parameters()
    flow = walk.begin(parameters, batch)
    x, found = flow.x, []
    for index in range(config.layers):
        leaves = walk.leaves_of(parameters, index)
        told = None if routing is None else routing[index]
        around = (x, flow.positions, flow.segments, told)
        x, went = _layer(config.layer_shape(index), _hashable(walk.plans_of(index)), mode, leaves, *around)  # fmt: skip
        found.append(went)
    return walk.finish(parameters, type(flow)(**{**vars(flow), "x": x})), found


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _layer(
    shape: LayerShape, plans: tuple[tuple[str, Plan], ...], mode: Mode, leaves: dict[str, Any],
    x: jax.Array, positions: jax.Array, segments: jax.Array, told: Any,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:  # fmt: skip
    block, taps = Block(shape, nest(leaves), dict(plans)), Taps()
    if mode != "free":
        block.router = Told(block.router, mode, told)
    x, _, _ = block(x, Context(positions, segments), None, None, None, taps)
    return x, told if mode != "free" else (taps["router/experts"], taps["router/weights"])


def _hashable(plans: Mapping[str, Plan]) -> tuple[tuple[str, Plan], ...]:
    return tuple(sorted(plans.items()))


def moved(
    before: tuple[np.ndarray, np.ndarray], after: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (whether each token's set of experts changed, the share of its weight that lay on experts it lost).

    Shapes: experts and weights [..., X]; returns bool [...] and float [...].
    """
    (experts, weights), (others, _) = before, after
    stays = (experts[..., :, None] == others[..., None, :]).any(axis=-1)
    share = weights / weights.sum(axis=-1, keepdims=True)
    return ~stays.all(axis=-1), np.where(stays, 0.0, share).sum(axis=-1)
