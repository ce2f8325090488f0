"""The mixture of experts of 26B A4B: router and experts.

The router looks at the residual itself, before any learned norm:

    r = rms(x) * scale * D^(-1/2)       p = softmax(r Wrouter) in float32       I = the k largest
    w_e = p_e / sum_I p * per_expert_scale_e        (scaled after the renormalization, not renormalized again)

No token is dropped and there is no capacity: the k rows of every token are sorted by expert and each expert multiplies
its own rows (`contract_grouped`), forward and backward. How rows get to experts on other devices: `expert_parallel.py`.

Source: `Gemma4TextRouter` / `Gemma4TextExperts` in huggingface/transformers; google-deepmind/gemma `gm/nn/gemma4`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gemma_qat.nn.contract import Weight, contract, contract_grouped
from gemma_qat.nn.expert_parallel import mixed, over_devices
from gemma_qat.nn.feedforward import gelu
from gemma_qat.nn.module import Leaves, Module, Param
from gemma_qat.nn.norms import rms
from gemma_qat.nn.shapes import ExpertsShape
from gemma_qat.nn.taps import Taps, among, counted, listen, looks_inside, tally, tap, under
from gemma_qat.quant.plan import Plan
from gemma_qat.sharding import Placement


class Router(Module):
    """Chooses experts and their weights for every token, in float32."""

    def __init__(
        self, shape: ExpertsShape, eps: float, leaves: Leaves, plans: dict[str, Plan]
    ) -> None:
        self.shape = shape
        self.eps = eps
        self.proj = Weight("kernel", leaves["proj"], (0,), plans.get("proj/kernel"))
        self.scale = Param(leaves["scale"])
        self.per_expert_scale = Param(leaves["per_expert_scale"])

    def __call__(
        self, x: Float[Array, "B T D"], taps: Taps | None = None
    ) -> tuple[Int[Array, "B T X"], Float[Array, "B T X"]]:
        """Returns (experts of each token by falling probability, their weights)."""
        inner = listen(taps)
        wide = x.astype(jnp.float32)
        scale = self.scale.get_value().astype(jnp.float32) * x.shape[-1] ** -0.5
        r = rms(wide, self.eps) * scale[None, None, :]
        probabilities = jax.nn.softmax(contract("BTD,DE->BTE", r, self.proj, inner), axis=-1)
        top, experts = jax.lax.top_k(probabilities, self.shape.per_token)
        weights = top / jnp.sum(top, axis=-1, keepdims=True)
        weights = weights * jnp.take(self.per_expert_scale.get_value().astype(jnp.float32), experts)
        under(taps, "proj", inner)
        tap(taps, "experts", experts)
        tap(taps, "weights", weights)
        tally(taps, "tokens", lambda: _count(experts, self.shape.count, counted(taps)))
        return (
            _for_all(experts, weights, self.shape.count)
            if self.shape.calls_all
            else (experts, weights)
        )


def _count(
    experts: Int[Array, "B T X"], count: int, valid: Bool[Array, "B T"] | None = None
) -> Int[Array, "E"]:
    """Returns how many tokens chose each expert, of those that are `valid`."""
    ones = jnp.ones_like(experts)
    if valid is not None:
        ones = jnp.where(valid[..., None], ones, 0)
    flat = experts.reshape(experts.size)
    return jnp.bincount(flat, weights=ones.reshape(ones.size), length=count)


def _sorted(valid: Bool[Array, "B T"], experts: Int[Array, "B T X"]) -> Bool[Array, "C"]:
    """Returns, for every row in the order of `mixed`, whether its token is valid."""
    order = jnp.argsort(experts.reshape(experts.size), stable=True)
    return jnp.take(valid.reshape(valid.size), order // experts.shape[-1])


def _for_all(
    experts: Int[Array, "B T X"], weights: Float[Array, "B T X"], count: int
) -> tuple[Int[Array, "B T E"], Float[Array, "B T E"]]:
    """Returns every expert for every token, with weight 0 where it was not chosen."""
    chosen = jax.nn.one_hot(experts, count, dtype=weights.dtype)
    dense = jnp.einsum("BTX,BTXE->BTE", weights, chosen)
    everyone = jnp.arange(count, dtype=experts.dtype)[None, None, :]
    return jnp.broadcast_to(everyone, dense.shape), dense


class Experts(Module):
    """The experts of a layer, their matrices stacked along a leading axis."""

    def __init__(self, shape: ExpertsShape, leaves: Leaves, plans: dict[str, Plan]) -> None:
        self.shape = shape
        self.gate = Weight("kernel", leaves["gate"], (1,), plans.get("gate/kernel"))
        self.up = Weight("kernel", leaves["up"], (1,), plans.get("up/kernel"))
        self.down = Weight("kernel", leaves["down"], (1,), plans.get("down/kernel"))

    def __call__(
        self,
        y: Float[Array, "B T D"],
        experts: Int[Array, "B T X"],
        weights: Float[Array, "B T X"],
        taps: Taps | None = None,
        placement: Placement | None = None,
    ) -> Float[Array, "B T D"]:
        """Returns the weighted sum of each token's experts.

        On a mesh each device works for its own tokens (`expert_parallel.py`); whoever listens gets the plain form.
        """
        if placement is not None and placement.mesh.size > 1 and not looks_inside(taps):
            return over_devices(self, y, experts, weights, self.shape.count, placement)
        # Rows are those of tokens, sorted by expert: so is which of them count.
        inner = among(taps, lambda valid: _sorted(valid, experts))
        out = mixed(y, experts, weights, self.shape.count, lambda r, g: self.each(r, g, inner))
        if taps is not None and inner is not None:
            taps.update(inner)
        out = out.astype(y.dtype)
        tap(taps, "out", out)
        return out

    def each(
        self, rows: Float[Array, "C D"], group_sizes: Int[Array, "E"], taps: Taps | None = None
    ) -> Float[Array, "C D"]:
        """Returns each row through its expert; rows are sorted by expert, those past the last group mean nothing."""
        gate, up, down = listen(taps), listen(taps), listen(taps)
        hidden = gelu(contract_grouped(rows, self.gate, group_sizes, gate))
        hidden = hidden * contract_grouped(rows, self.up, group_sizes, up)
        out = contract_grouped(hidden, self.down, group_sizes, down)
        for name, inner in (("gate", gate), ("up", up), ("down", down)):
            under(taps, name, inner)
        return out
