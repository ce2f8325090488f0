"""The Gemma 4 text decoder.

    x = table[token] * sqrt(D)   ->   stack of layers   ->   norm   ->   head (the table again)   ->   30
    tanh(logits / 30)

A `Gemma4` is a view of its leaves: it is built from a flat dict of arrays (float, packed, traced or abstract alike), so
the same class is the float model, the fake-quantized one, and the packed one.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gemma_qat import kernels
from gemma_qat.errors import unknown
from gemma_qat.models.config import ModelConfig
from gemma_qat.models.layout import with_cuts
from gemma_qat.models.leaves import groups_of, stack_layers, unstack_layers
from gemma_qat.nn.attention import Context
from gemma_qat.nn.cache import KeyValues, slots_for
from gemma_qat.nn.contract import Weight, contract
from gemma_qat.nn.lookup import look_up
from gemma_qat.nn.module import Module, merge, nest, split, variables
from gemma_qat.nn.norms import RMSNorm
from gemma_qat.nn.per_layer import PerLayerInputs
from gemma_qat.nn.stack import Remat, Stack
from gemma_qat.nn.taps import Taps, listen, tap, under
from gemma_qat.numerics import PackedArray
from gemma_qat.quant.plan import Plans, summing_codes, weights_only, within
from gemma_qat.sharding import Placement, constrain

OFFLOADS = ("attn_out", "ffn_hidden")
"""Intermediates that layers give a name (`checkpoint_name`)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How the forward pass is run; but for `quantize` none of it changes what is computed beyond float rounding.

    `dtype` is that of activations; norms, softmax, router and logits are float32 whatever it is. `quantize` is how much
    of the plans is acted on, for schedules that begin in float: everything, weights only, or nothing.
    `remat` is what the backward pass recomputes (`nn/stack.py`): nothing, all but matrix products, each period, or each
    period but for the intermediates `offload` names, which wait in host memory. `sums` "integer": products of packed
    weights with inputs that have static scales are int32 sums of codes, which whoever sets it knows to be calibrated.
    """

    dtype: str = "float32"
    scan: bool = True
    remat: Remat = "none"
    offload: tuple[str, ...] = OFFLOADS
    quantize: Literal["all", "weights", "none"] = "all"
    sums: Literal["float", "integer"] = "float"

    def __post_init__(self) -> None:
        for name in self.offload:
            if name not in OFFLOADS:
                raise unknown("intermediate in options.offload", name, OFFLOADS)

    def active(self, plans: Plans) -> Plans:
        """Returns the plans that are acted on."""
        plans = {"all": plans, "weights": weights_only(plans), "none": {}}[self.quantize]
        return summing_codes(plans) if self.sums == "integer" else plans


class Gemma4(Module):
    """A Gemma 4 text decoder around given leaves."""

    def __init__(
        self,
        config: ModelConfig,
        leaves: Mapping[str, Any],
        plans: Plans | None = None,
        options: RunOptions = RunOptions(),
        placement: Placement | None = None,
    ) -> None:
        """Builds the model from in-memory leaves (`groups/...`; see `models/leaves.py`).

        `placement` says how activations lie on the mesh that the leaves lie on (`leaf_shardings`).
        """
        plans = plans or {}
        tree = nest(with_cuts(leaves, config, plans, placement))
        self.config = config
        self.options = options
        self.placement = placement
        self.plans = tuple(sorted(plans.items()))
        groups = groups_of(
            config, plans
        )  # how leaves are stacked does not depend on what is acted on
        plans = options.active(plans)
        self.embed = Weight("table", tree["embed"], (1,), plans.get("embed/table"))
        if not config.ties_head:
            self.head = Weight("table", tree["head"], (1,), plans.get("head/table"))
        if config.per_layer_width:
            self.per_layer = PerLayerInputs(
                config.eps, tree["per_layer"], within(plans, "per_layer")
            )
        self.stack = Stack(groups, tree["groups"], plans)
        self.final_norm = RMSNorm(tree["final_norm"], config.eps)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segments: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Returns the logits after the soft cap, float32.

        `segments`: 0 marks padding, tokens see only their own segment; `positions` restart in each. The default is one
        segment per row, counted from 0. Compiled once per shape.
        """
        graph, state = split(self)
        return _logits(graph, state, jnp.asarray(tokens), positions, segments)

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segments: Int[Array, "B T"] | None = None,
        caches: list[Any] | None = None,
        taps: Taps | None = None,
        *,
        empty_cache: bool = False,
    ) -> tuple[Float[Array, "B T D"], list[Any] | None]:
        """Returns (final hidden states after the last norm, caches after this call). Not compiled by itself."""
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
        padded = segments is not None
        if segments is None:
            segments = jnp.ones_like(tokens)
        context = Context(positions, segments, empty_cache, padded, self.placement)
        x = embedded(self.embed, tokens, self.config, self.options.dtype, self.placement, taps)
        per_layer = None
        if self.config.per_layer_width:
            per_layer = per_layer_inputs(
                self.per_layer, tokens, x, self.config, self.placement, taps
            )
        x, caches = self.stack(
            x, context, per_layer, caches, taps,
            scan=self.options.scan, remat=self.options.remat, offload=self.options.offload,
        )  # fmt: skip
        x = self.final_norm(x)
        tap(taps, "final_norm", x)
        return x, caches

    def logits(
        self, hidden: Float[Array, "B T D"], taps: Taps | None = None
    ) -> Float[Array, "B T V"]:
        """Returns the soft-capped logits of final hidden states, float32."""
        weight = self.embed if self.config.ties_head else self.head
        inner = listen(taps)
        out = _capped_logits(hidden, weight, self.config, self.placement, inner)
        under(taps, head_name(self.config), inner)
        return out

    def top(
        self, hidden: Float[Array, "B T D"], k: int
    ) -> tuple[Float[Array, "B T k"], Int[Array, "B T k"]]:
        """Returns the k largest soft-capped logits and their tokens, the lower token first of equal ones.

        A packed head whose operands are not rounded is read once and its logits are not written out.
        """
        weight = self.embed if self.config.ties_head else self.head
        rounds = weight.plan is not None and bool(weight.plan.activations)
        if isinstance(weight.leaf, PackedArray) and not rounds:
            hidden = constrain(hidden, ("rows", None, None), self.placement)
            return kernels.top(hidden, weight.leaf, k, self.config.logit_softcap)
        values, tokens = jax.lax.top_k(self.logits(hidden), k)
        return values, tokens

    def empty_caches(
        self, batch: int, length: int, kind: str | None = None
    ) -> list[list[KeyValues | None]]:
        """Returns empty caches for sequences of up to `length` tokens, of a float dtype, int8 or int4.

        Shapes: per group and position in its period, leaves [repeats, B, slots, K, H]; None for KV-sharing layers.
        """
        return [
            [
                self._empty_cache(shape, group.repeats, batch, length, kind or self.options.dtype)
                for shape in group.period
            ]
            for group in self.stack.schedule
        ]

    def _empty_cache(
        self, shape: Any, repeats: int, batch: int, length: int, kind: str
    ) -> KeyValues | None:
        if shape.shares_kv:
            return None
        slots = slots_for(length, shape.window, kind)
        one = KeyValues.empty(batch, slots, shape.kv_heads, shape.head_width, kind)
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[None], (repeats, *leaf.shape)), one)

    def leaves(self) -> dict[str, Any]:
        """Returns the leaves by in-memory path (`groups/...`), packed arrays whole."""
        return flat_leaves(split(self)[1])

    def parameters(self) -> dict[str, Any]:
        """Returns the leaves by checkpoint path (`layers/17/...`), one layer each."""
        return unstack_layers(self.leaves(), self.config, dict(self.plans))

    @classmethod
    def from_parameters(
        cls,
        config: ModelConfig,
        parameters: Mapping[str, Any],
        plans: Plans | None = None,
        options: RunOptions = RunOptions(),
        placement: Placement | None = None,
    ) -> Gemma4:
        """Builds the model from leaves by checkpoint path (`layers/17/...`)."""
        stacked = stack_layers(parameters, config, plans or {})
        return cls(config, stacked, plans, options, placement)


def embedded(
    embed: Weight,
    tokens: Int[Array, "B T"],
    config: ModelConfig,
    dtype: str,
    placement: Placement | None = None,
    taps: Taps | None = None,
) -> Float[Array, "B T D"]:
    """Returns the residual stream in front of layer 0: rows of the table, scaled by the root of the width."""
    inner = listen(taps)
    # The factor is rounded to the activation dtype before it multiplies, as the reference models do.
    factor = jnp.asarray(config.width**0.5, dtype)
    x = look_up(embed, tokens, "vocab", dtype, placement, inner) * factor
    x = constrain(x, ("batch", None, None), placement)
    under(taps, "embed", inner)
    tap(taps, "embed/out", x)
    return x


def per_layer_inputs(
    inputs: PerLayerInputs,
    tokens: Int[Array, "B T"],
    x: Float[Array, "B T D"],
    config: ModelConfig,
    placement: Placement | None = None,
    taps: Taps | None = None,
) -> Float[Array, "L B T P"]:
    """Returns what every layer of E2B and E4B gets of the tokens, beside the stream `x` in front of layer 0."""
    inner = listen(taps)
    # A text-only vocabulary may be smaller than the per-layer table's and the other way round: ids outside use 0.
    ids = jnp.where(tokens < config.per_layer_vocab, tokens, 0)
    per_layer = inputs(ids, x, inner, placement)
    under(taps, "per_layer", inner)
    return jnp.moveaxis(per_layer, 2, 0)


def head_name(config: ModelConfig) -> str:
    """Returns what the head's leaves lie under: the embedding's name when it is tied."""
    return "embed" if config.ties_head else "head"


def head_logits(
    config: ModelConfig,
    leaves: Mapping[str, Any],
    plans: Plans,
    hidden: Float[Array, "B T D"],
    options: RunOptions = RunOptions(),
    placement: Placement | None = None,
) -> Float[Array, "B T V"]:
    """Returns `Gemma4.logits` as a function of the head's leaves (those under `head_name(config)/`) alone."""
    name = head_name(config)
    plan = options.active(plans).get(f"{name}/table")
    weight = Weight("table", nest(leaves)[name], (1,), plan)
    return _capped_logits(hidden, weight, config, placement, None)


def _capped_logits(
    hidden: jax.Array,
    weight: Weight,
    config: ModelConfig,
    placement: Placement | None,
    taps: Taps | None,
) -> jax.Array:
    # Rows of the table stay where they are: hidden states go to them, and a device computes its own part of V.
    hidden = constrain(hidden, ("rows", None, None), placement)
    out = contract("BTD,VD->BTV", hidden, weight, taps).astype(jnp.float32)
    out = constrain(out, ("rows", None, "vocab"), placement)
    cap = config.logit_softcap
    return out if cap is None else cap * jnp.tanh(out / cap)


def flat_leaves(state: Any) -> dict[str, Any]:
    """Returns the leaves of an NNX state by path, as in-memory names."""
    flat = {}
    for path, variable in variables(state):
        # Modules are attributes ('stack/groups/0/blocks/1/...'); leaf names leave the containers out.
        parts = [str(p) for p in path if p not in ("stack", "blocks")]
        leaf = variable.get_value()
        # How it lies is known to whoever builds a model around it, and may be another way.
        packed = isinstance(leaf, PackedArray)
        flat["/".join(parts)] = dataclasses.replace(leaf, cut=None) if packed else leaf
    return flat


@functools.partial(jax.jit, static_argnums=0)
def _logits(graph: Any, state: Any, tokens: Any, positions: Any, segments: Any) -> jax.Array:
    model = merge(graph, state)
    hidden, _ = model.hidden(tokens, positions, segments)
    return model.logits(hidden)
