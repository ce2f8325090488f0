"""AWQ: inputs that matter get finer steps, by scales that are folded into what stands before (Lin et al. 2306.00978).

    x W = (x / s) (s W)          codes of s W: the errors of input r come out divided by s_r

s_r = (root mean square of x_r)^alpha, over the root of its largest times its least. Alpha is the one of a grid from 0
(no scaling) to 1 with the least error of the outputs, sum over weights of tr(d^T E[x x^T] d), where d is what rounding
`s W` does to W. Then scales of codes are searched with errors weighed by E[(x / s)^2], which is the paper's clipping on
a finer grid; the paper leaves queries and keys unclipped.

`x / s` has to come from somewhere for free. What stands before in Gemma 4:

| scaled inputs of | divided instead | because |
|---|---|---|
| q, k, v | weight of `pre_attn_norm` | nothing else reads that norm (some layers lack k or v) |
| feed-forward gate, up | weight of `pre_ffn_norm` | the router reads the residual with a scale of its own |
| feed-forward down | outputs of up | gelu(gate) * up is linear in up |
| experts' gate, up | weight of `pre_experts_norm`, so one s for all experts | the same |
| each expert's down | outputs of its up | the same |

Not folded: o (its inputs are averages of values, which are normalized without a weight after v, so no scale passes),
the per-layer gate (reads the residual) and projection (its inputs are made of a norm and a table that all layers
share), the router, the head (shares the final norm's output with nothing, but its table with the embedding). They are
searched with weighed errors alone.

A weight that stays in float is multiplied all the same: the float model computes what it did. Scales are of inputs in
float: where a recipe rounds activations they are smoother than before, which nothing here counts on.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gemma_qat.numerics import Grid, QArray, mse_search, quantize
from gemma_qat.numerics.tiles import split_axes
from gemma_qat.ptq.config import PtqConfig
from gemma_qat.ptq.layer import LayerTask, Quantized, Reduced, Seen
from gemma_qat.ptq.rtn import ROUNDINGS

ALPHAS = np.linspace(0.0, 1.0, 21)
"""Exponents that are tried; the first scales nothing."""

COARSE, FINE = 25, 100
"""Scales of codes that are tried for each alpha, and for the one that is taken (as `mse` does)."""

LEAST = 1e-4
"""Root mean square of an input that counts as no smaller, as a fraction of the largest."""


@dataclasses.dataclass(frozen=True)
class Fold:
    """Weights of a layer whose inputs may be scaled together, and the leaf whose outputs are divided instead."""

    behind: str
    into: tuple[str, ...]


FOLDS = (
    Fold("pre_attn_norm/weight", ("attn/q/kernel", "attn/k/kernel", "attn/v/kernel")),
    Fold("pre_ffn_norm/weight", ("ffn/gate/kernel", "ffn/up/kernel")),
    Fold("ffn/up/kernel", ("ffn/down/kernel",)),
    Fold("pre_experts_norm/weight", ("experts/gate/kernel", "experts/up/kernel")),
    Fold("experts/up/kernel", ("experts/down/kernel",)),
)


def folded(
    leaves: Mapping[str, Any], fold: Fold, scale: Float[Array, "..."]
) -> dict[str, jax.Array]:
    """Returns the leaves of a layer that change when the inputs of `fold.into` are scaled: the same function.

    Shapes: scale [R], or [E, R] for each expert's own.
    """
    behind = leaves[fold.behind]
    out = {fold.behind: behind / (scale if behind.ndim == 1 else jnp.expand_dims(scale, -2))}
    for name in fold.into:
        if name in leaves:
            axis = 1 if name.startswith("experts/") else 0
            out[name] = leaves[name] * _along(scale, leaves[name].shape, (axis,))
    return out


def quantize_layer(task: LayerTask) -> Quantized:
    """Returns a layer's codes, and the norm weights (and weights left in float) that scales were folded into."""
    seen, notes = task.seen(tuple(task.plans), full=True)
    leaves, importance = dict(task.leaves), {name: one.importance for name, one in seen.items()}
    for fold in FOLDS:
        planned = [name for name in fold.into if name in task.plans]
        if not planned or fold.behind not in leaves:
            continue
        scale = best_scale(
            [(leaves[n], task.plans[n].weight, task.reduced[n], seen[n]) for n in planned],
            own="norm" not in fold.behind,
        )
        leaves |= folded(leaves, fold, scale)
        importance |= {name: _behind(importance[name], scale) for name in planned}
    search = ROUNDINGS["mse"]
    codes = {
        name: search(leaves[name], plan.weight, task.reduced[name], importance[name])
        for name, plan in task.plans.items()
    }
    changed = {
        name: leaf
        for name, leaf in leaves.items()
        if name not in codes and leaf is not task.leaves[name]
    }
    return Quantized(codes=codes, changed=changed, notes=notes)


def quantize_site(
    w: jax.Array, grid: Grid, reduced: Reduced, seen: Seen | None, config: PtqConfig
) -> tuple[QArray, tuple[str, ...]]:
    """Returns the codes of a weight outside the layers: searched, with weighed errors where its inputs are known."""
    return ROUNDINGS["mse"](w, grid, reduced, None if seen is None else seen.importance), ()


def best_scale(
    weights: list[tuple[jax.Array, Grid, Reduced, Seen]], *, own: bool
) -> Float[Array, "..."]:
    """Returns the scale of inputs with the least error of the outputs of `weights`, which share their inputs.

    With experts each has a scale of its own if `own`, [E, R]; else all weigh in by their tokens, and it is [R].
    Exactness: no scaling is among the candidates, and what is returned is no worse than that with the codes that
        `mse` searches for with importance.
    """
    importance = weights[0][3].importance
    tokens = weights[0][3].tokens
    if importance.ndim == 2 and not own:
        importance = jnp.einsum("E,ER->R", tokens / jnp.maximum(jnp.sum(tokens), 1), importance)

    def loss(scale: jax.Array, steps: int) -> jax.Array:
        parts = [_loss(w, scale, seen, grid, axes, steps) for w, grid, axes, seen in weights]
        total = functools.reduce(jnp.add, parts)
        return total if own or not total.ndim else jnp.sum(total * tokens)

    best = nothing = jnp.ones_like(importance)
    least = loss(nothing, COARSE)
    for alpha in ALPHAS[1:]:
        scale = _scale(importance, alpha)
        found = loss(scale, COARSE)
        best = jnp.where((found < least)[..., None], scale, best)
        least = jnp.minimum(found, least)
    better = loss(best, FINE) < loss(nothing, FINE)
    return jnp.where(better[..., None], best, nothing)


def _scale(importance: jax.Array, alpha: float) -> jax.Array:
    """Returns (root of importance)^alpha with its largest and least as far above 1 as below, [R] or [E, R]."""
    size = jnp.sqrt(importance)
    top = jnp.max(size, axis=-1, keepdims=True)
    size = jnp.maximum(size / jnp.where(top > 0, top, 1.0), LEAST) ** np.float32(alpha)
    return size / jnp.sqrt(jnp.max(size, -1, keepdims=True) * jnp.min(size, -1, keepdims=True))


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _loss(
    w: jax.Array, scale: jax.Array, seen: Seen, grid: Grid, reduced: Reduced, steps: int
) -> jax.Array:
    """Returns the mean squared error of the outputs, summed over them: [] or, of experts, [E]."""
    wide = _along(scale, w.shape, reduced)
    scaled, importance = w * wide, _behind(seen.importance, scale)
    step = mse_search(scaled, grid, reduced, steps=steps, importance=importance)
    error = quantize(scaled, grid, reduced, step).dequantize() / wide - w
    lead, length, trail = split_axes(w.shape, reduced)
    outputs = int(np.prod(trail))
    error = error.reshape(*lead, length, outputs)
    if not seen.is_full:
        return jnp.sum(seen.importance[..., None] * jnp.square(error), axis=(-2, -1))
    return jnp.sum(error * jnp.matmul(seen.moments, error, precision="highest"), axis=(-2, -1))


def _behind(importance: jax.Array, scale: jax.Array) -> jax.Array:
    """Returns the mean squares of inputs that were divided by `scale`."""
    return importance / jnp.square(jnp.broadcast_to(scale, importance.shape))


def _along(scale: jax.Array, shape: tuple[int, ...], reduced: Reduced) -> jax.Array:
    """Returns `scale` [R] or [E, R] in the rank of a weight, ones for its outputs."""
    lead, _, trail = split_axes(shape, reduced)
    first = lead if scale.ndim > 1 else (1,) * len(lead)
    inner = tuple(shape[axis] for axis in reduced)
    return scale.reshape(*first, *inner, *(1,) * len(trail))
