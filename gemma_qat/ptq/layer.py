"""One decoder layer as a method gets it: its leaves, what flows into it, and what its weights are multiplied with.

Names of sites are relative to the layer (`attn/q/kernel`). A layer that is quantized in part runs with the values of
the codes that are there: codes of static scales see floats (they are calibrated at the end), activations that are
rounded per token or tile are rounded as they will be.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gemma_qat.errors import InputError
from gemma_qat.models import Flow, Layerwise
from gemma_qat.numerics import Grid, QArray
from gemma_qat.ptq.config import PtqConfig
from gemma_qat.quant import Activation, Plan, Plans
from gemma_qat.quant.rounded import Rounded

Reduced = tuple[int, ...]

SAME_INPUT = {
    "attn/k/kernel": "attn/q/kernel",
    "attn/v/kernel": "attn/q/kernel",
    "ffn/up/kernel": "ffn/gate/kernel",
    "experts/up/kernel": "experts/gate/kernel",
}
"""Sites that are multiplied with what another one is: its moments are theirs."""

FEWEST = 32
"""Tokens below which an expert has not been seen often enough to be judged by them."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Seen:
    """What a site is multiplied with, on average.

    Shapes: `moments` float32, E[x x^T] [R, R] of a site, [E, R, R] of experts; or only its diagonal, [R] or [E, R];
    `tokens` [] or [E], how many tokens it is the average of.
    """

    moments: jax.Array
    tokens: jax.Array

    @property
    def is_full(self) -> bool:
        """Whether there are matrices, and not only their diagonals."""
        return self.moments.ndim == self.tokens.ndim + 2

    @property
    def importance(self) -> jax.Array:
        """The mean square of each input, [R] or [E, R]."""
        return jnp.diagonal(self.moments, axis1=-2, axis2=-1) if self.is_full else self.moments


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantized:
    """What a method makes of a layer: codes by site, other float leaves that it changed, and what there is to tell."""

    codes: dict[str, QArray]
    changed: dict[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerTask:
    """A layer to be quantized.

    `leaves` float32 by name; `plans` of the sites to quantize; `reduced` axes of each; `flows` the batches in front of
    the layer, behind the quantized layers before it, on the host (none for a method that looks at no text).
    """

    index: int
    walk: Layerwise
    leaves: Mapping[str, Any]
    plans: Plans
    reduced: Mapping[str, Reduced]
    flows: Sequence[Flow] = ()
    config: PtqConfig = PtqConfig()

    def seen(self, names: Sequence[str], *, full: bool) -> tuple[dict[str, Seen], tuple[str, ...]]:
        """Returns (what each of `names` is multiplied with over all batches, what there is to tell of experts).

        The layer runs with its float weights. An expert that fewer than `FEWEST` tokens chose gets the average of all
        experts' tokens, or equal importance where it is not fed by the stream (its own hidden units): then nothing is
        known.
        Raises: InputError naming a site whose inputs are not finite.
        """
        wanted = frozenset(SAME_INPUT.get(name, name) for name in names)
        sums: Any = None
        for flow in self.flows:
            found = self.walk.moments(self.index, self.leaves, flow, full=full, only=wanted)
            sums = found if sums is None else jax.tree.map(jnp.add, sums, found)
        at = f"layers/{self.index}"
        means = {n: finite(_mean(sums[n], n, full), f"{at}/{n}") for n in sorted(wanted)}
        told = []
        for name in sorted(wanted):
            count = sums[name]["count"]
            few = int(jnp.sum(count < FEWEST)) if count.ndim else 0
            if few:
                how = "equal importance" if "down" in name else "the average of all experts'"
                told.append(
                    f"layers/{self.index}/{name}: {few} of {count.size} experts saw fewer than {FEWEST} tokens "
                    f"(the fewest {int(count.min())}): {how}"
                )
        return {name: means[SAME_INPUT.get(name, name)] for name in names}, tuple(told)

    def outputs(
        self, codes: Mapping[str, QArray], changed: Mapping[str, Any] | None = None
    ) -> Iterator[Flow]:
        """Yields the batches behind the layer with these codes and float leaves, on the host."""
        walk, given = self._running({**self.leaves, **(changed or {})}, codes)
        for flow in self.flows:
            yield jax.device_get(walk.layer(self.index, given, flow))

    def _running(
        self, leaves: Mapping[str, Any], codes: Mapping[str, QArray]
    ) -> tuple[Layerwise, dict[str, Any]]:
        given, plans = dict(leaves), {}
        for name, q in codes.items():
            plan = running(self.plans[name])
            value = q.dequantize()
            given[name] = value if plan is None else Rounded(value, q)
            if plan is not None:
                plans[f"layers/{self.index}/{name}"] = plan
        return dataclasses.replace(self.walk, plans=plans), given


def finite(seen: Seen, path: str) -> Seen:
    """Returns `seen`, which no method can weigh errors by where it is not finite.

    Raises: InputError naming the site at `path`.
    """
    if not bool(jnp.all(jnp.isfinite(seen.moments))):
        raise InputError(f"{path}: the text makes inf or nan of what it is multiplied with")
    return seen


def running(plan: Plan) -> Plan | None:
    """Returns a plan without its static scales, as it is before they are calibrated; None when no rounding is left."""

    def dynamic(how: Activation | None) -> Activation | None:
        return None if how is None or how.is_static else how

    left = dataclasses.replace(
        plan, input=dynamic(plan.input), output=dynamic(plan.output), cache=dynamic(plan.cache)
    )
    return left if left.activations else None


@functools.partial(jax.jit, static_argnums=(1, 2))
def _mean(sums: dict[str, jax.Array], name: str, full: bool) -> Seen:
    total, count = sums["sum"], sums["count"]
    if not count.ndim:
        return Seen(moments=total / jnp.maximum(count, 1), tokens=count)
    shape = (-1,) + (1,) * (total.ndim - 1)
    own = total / jnp.maximum(count, 1).reshape(shape)
    width = total.shape[-1]
    # What experts are fed is the stream, the same for all; their hidden units are their own.
    nothing = jnp.eye(width) if full else jnp.ones(width)
    shared = jnp.sum(total, 0) / jnp.maximum(jnp.sum(count), 1)
    other = jnp.broadcast_to((nothing if "down" in name else shared)[None], own.shape)
    return Seen(moments=jnp.where(count.reshape(shape) < FEWEST, other, own), tokens=count)


SiteMethod = Callable[
    [jax.Array, Grid, Reduced, Seen | None, PtqConfig], tuple[QArray, tuple[str, ...]]
]
"""(weight [lead..., reduced..., trail...], grid, reduced axes, what is known of its input, options) -> (codes,
what there is to tell)."""

LayerMethod = Callable[[LayerTask], Quantized]
