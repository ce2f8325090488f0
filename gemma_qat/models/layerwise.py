"""The model a layer at a time: what quantizes, or trains, one layer needs no other layer in memory.

    begin     tokens -> residual stream, per-layer inputs
    layer     one decoder layer, of its own leaves, applied to the stream
    moments   the same layer, listened to: second moments of what each of its weights is multiplied with
    finish    the last norm

Between layers a `Flow` is plain arrays, which may wait in host memory. It is the same `Block` that the stack scans
over; equal layers share a compiled program.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gemma_qat.models.config import ModelConfig
from gemma_qat.models.gemma4 import RunOptions, embedded, per_layer_inputs
from gemma_qat.nn.attention import Context
from gemma_qat.nn.block import Block
from gemma_qat.nn.cache import KeyValues
from gemma_qat.nn.contract import Weight
from gemma_qat.nn.module import nest
from gemma_qat.nn.norms import RMSNorm
from gemma_qat.nn.per_layer import PerLayerInputs
from gemma_qat.nn.shapes import LayerShape
from gemma_qat.nn.stack import kv_sources
from gemma_qat.nn.taps import Moments, Taps
from gemma_qat.quant.plan import Plan, Plans, within


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Flow:
    """A batch on its way through the layers.

    Shapes: tokens, positions, segments int32 [B, T]; x [B, T, D] in the dtype of activations; per_layer [L, B, T, P] or
    None; `sources` are the keys and values that KV-sharing layers read, by layer kind.
    """

    tokens: Any
    positions: Any
    segments: Any
    x: Any
    per_layer: Any = None
    sources: dict[str, KeyValues] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Layerwise:
    """A model's layers as functions of their own leaves; `plans` by checkpoint path, none for a float model."""

    config: ModelConfig
    plans: Plans = dataclasses.field(default_factory=dict)
    options: RunOptions = RunOptions()

    def leaves_of(self, parameters: Mapping[str, Any], index: int) -> dict[str, Any]:
        """Returns the leaves of layer `index` (`attn/q/kernel`) of leaves by checkpoint path; reads no others."""
        start = f"layers/{index}/"
        return {
            path[len(start) :]: parameters[path] for path in parameters if path.startswith(start)
        }

    def plans_of(self, index: int) -> Plans:
        """Returns the plans of layer `index` that are acted on, by the same names."""
        return within(self.options.active(self.plans), f"layers/{index}")

    def begin(self, parameters: Mapping[str, Any], batch: Mapping[str, Any]) -> Flow:
        """Returns a batch (tokens, positions, segments int32 [B, T]) in front of layer 0."""
        names = [p for p in parameters if p == "embed/table" or p.startswith("per_layer/")]
        names += [p for p in parameters if p.startswith("embed/table_")]
        leaves = {path: parameters[path] for path in names}
        tokens, positions, segments = (
            jnp.asarray(batch[name]) for name in ("tokens", "positions", "segments")
        )
        active = self.options.active(self.plans)
        plans = {p: plan for p, plan in active.items() if not p.startswith("layers/")}
        x, per_layer = _begin(self.config, _hashable(plans), self.options, leaves, tokens)
        return Flow(tokens=tokens, positions=positions, segments=segments, x=x, per_layer=per_layer)

    def layer(self, index: int, leaves: Mapping[str, Any], flow: Flow) -> Flow:
        """Returns the batch behind layer `index`."""
        x, kv, _ = self._run(index, leaves, flow, None)
        sources = flow.sources
        if kv_sources(self.config.layer_shapes()).get(self.config.layer_kinds[index]) == index:
            sources = sources | {self.config.layer_kinds[index]: kv}
        return dataclasses.replace(flow, x=x, sources=sources)

    def moments(
        self, index: int, leaves: Mapping[str, Any], flow: Flow, *, full: bool,
        only: frozenset[str] | None = None,
    ) -> dict[str, dict[str, jax.Array]]:  # fmt: skip
        """Returns the sums of `nn/moments.py` of one batch by weight of layer `index` (`attn/q/kernel`).

        Padding is not counted. `full`: whole matrices, else their diagonals. With `only` those weights', and nothing
        of the layer runs that they do not need.
        """
        return self._run(index, leaves, flow, (full, only))[2]

    def finish(self, parameters: Mapping[str, Any], flow: Flow) -> jax.Array:
        """Returns the final hidden states [B, T, D], after the last norm."""
        return RMSNorm({"weight": parameters["final_norm/weight"]}, self.config.eps)(
            jnp.asarray(flow.x)
        )

    def _run(
        self, index: int, leaves: Mapping[str, Any], flow: Flow, sums: _Sums | None
    ) -> tuple[Any, Any, Any]:
        shape, per = self.config.layer_shape(index), None
        if flow.per_layer is not None:
            per = jnp.asarray(flow.per_layer[index])
        source = flow.sources.get(shape.kind) if shape.shares_kv else None
        around = (jnp.asarray(flow.x), flow.positions, flow.segments, per, source)
        plans = _hashable(self.plans_of(index))
        return _layer(shape, plans, sums, dict(leaves), *around)


def run_block(
    shape: LayerShape,
    plans: Plans,
    leaves: Mapping[str, Any],
    x: jax.Array,
    positions: jax.Array,
    segments: jax.Array,
    per_layer: jax.Array | None,
    source: KeyValues | None,
    taps: Taps | None = None,
) -> tuple[jax.Array, KeyValues]:
    """Returns (residual behind one layer, the keys and values its attention looked at); to be traced by its caller.

    Shapes: x [B, T, D]; positions, segments int32 [B, T]; per_layer [B, T, P]; leaves by name (`attn/q/kernel`).
    """
    block = Block(shape, nest(leaves), plans)
    context = Context(positions, segments)
    x, kv, _ = block(x, context, per_layer, source, None, taps)
    return x, kv


def _hashable(plans: Plans) -> tuple[tuple[str, Plan], ...]:
    return tuple(sorted(plans.items()))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _begin(
    config: ModelConfig, plans: tuple[tuple[str, Plan], ...], options: RunOptions,
    leaves: dict[str, Any], tokens: jax.Array,
) -> tuple[jax.Array, jax.Array | None]:  # fmt: skip
    tree, planned = nest(leaves), dict(plans)
    embed = Weight("table", tree["embed"], (1,), planned.get("embed/table"))
    x = embedded(embed, tokens, config, options.dtype)
    if not config.per_layer_width:
        return x, None
    inputs = PerLayerInputs(config.eps, tree["per_layer"], within(planned, "per_layer"))
    return x, per_layer_inputs(inputs, tokens, x, config)


_Sums = tuple[bool, frozenset[str] | None]
"""Whether whole matrices are wanted, and of which weights (None: all)."""


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _layer(
    shape: LayerShape, plans: tuple[tuple[str, Plan], ...], sums: _Sums | None, leaves: dict[str, Any],
    x: jax.Array, positions: jax.Array, segments: jax.Array, per_layer: Any, source: Any,
) -> tuple[Any, Any, dict[str, Any]]:  # fmt: skip
    """Either what flows on or moments: what nobody asked for is not computed."""
    around = (positions, segments, per_layer, source)
    if sums is None:
        return *run_block(shape, dict(plans), leaves, x, *around), {}
    full, only = sums
    taps = Moments(segments > 0, full=full)
    run_block(shape, dict(plans), leaves, x, *around, taps)
    end = "/moments"
    found = {name.removesuffix(end): value for name, value in taps.items() if name.endswith(end)}
    return None, None, {n: value for n, value in found.items() if only is None or n in only}
