"""Fake quantization: the forward pass sees the deployed weights, the gradient reaches the masters.

    forward    w_hat = dequantize(quantize(w, scale))                    exactly what is exported
    backward   dw    = g where the code was not clipped, else 0          straight through, clipped (or everywhere)
               ds    = gradient_scale * sum over the tile of g * r       (learned scales only)
                       r = (c - zero) - w / s   where not clipped
                       r = c - zero             where clipped
               gradient_scale = 1 / sqrt(tile * highest code)

               r = c - zero everywhere      where masters are held while scales train: dw is nothing

This is a `custom_vjp` and not `w + stop_gradient(w_hat - w)`: the latter is not equal to w_hat in floating point, and
then what is trained is not what is served.

Learned scales are kept as float32 masters and used as they will be stored: rounded to the grid's scale dtype first, or
to the two levels of a super-block (straight through), so the scales in a GGUF file are those the network was trained
with.

Source: Esser et al., Learned Step Size Quantization (arXiv 1902.08153), for ds and its gradient scale; the signed
extremum grid needs no change, s may be negative. With recomputed scales nothing clips but the far end of the lopsided
grids, and the gradient passes straight through there as well. The - w / s in r stands for codes that follow a master as
its scale moves; a held one that lies on the grid keeps its codes, and r is the derivative itself (EfficientQAT, arXiv
2407.11062, trains scales so).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from gemma_qat.numerics import Grid, QArray, quantize
from gemma_qat.numerics.rounding import unclipped
from gemma_qat.numerics.scales import stored
from gemma_qat.numerics.tiles import tiled_shape
from gemma_qat.quant.plan import Gradient, Held, Plan


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def fake_quantize(w: jax.Array, grid: Grid, reduced: tuple[int, ...]) -> tuple[jax.Array, QArray]:
    """Returns (dequantized weight, its codes and scales), scales recomputed from the weights.

    Shapes: w [lead..., reduced..., trail...]; both results in the weight's axes.
    Exactness: the first equals `quantize(w).dequantize()` bit for bit, in float32.
    """
    q = quantize(w, grid, reduced)
    return q.dequantize(), q


def _forward(w: jax.Array, grid: Grid, reduced: tuple[int, ...]):
    # An empty array carries the dtype of the weight, whose gradient must have it.
    return fake_quantize(w, grid, reduced), jnp.zeros((0,), w.dtype)


def _backward(grid: Grid, reduced: tuple[int, ...], residuals: jax.Array, cotangents):
    del grid, reduced
    return (cotangents[0].astype(residuals.dtype),)


fake_quantize.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def fake_quantize_learned(
    w: jax.Array,
    scale: jax.Array,
    grid: Grid,
    reduced: tuple[int, ...],
    gradient: Gradient | Held = "clipped",
) -> tuple[jax.Array, QArray]:
    """Returns (dequantized weight, its codes and scales) for given scales, which get a gradient too.

    `gradient`: what reaches a weight whose code saturates, nothing (`clipped`) or everything (`straight`); nothing
    reaches any weight that is `held`.
    Shapes: w [lead..., reduced..., trail...]; scale float32 [lead..., Q, trail...].
    """
    del gradient
    q = quantize(w, grid, reduced, scale)
    return q.dequantize(), q


def _forward_learned(
    w: jax.Array, scale: jax.Array, grid: Grid, reduced: tuple[int, ...], gradient: Gradient | Held
):
    return fake_quantize_learned(w, scale, grid, reduced, gradient), (w, scale)


def _backward_learned(
    grid: Grid, reduced: tuple[int, ...], gradient: Gradient | Held, residuals, cotangents
):
    w, scale = residuals
    fmt, axis = grid.number, reduced[0] + 1
    shape = tiled_shape(w.shape, reduced, grid)
    view, g = w.astype(jnp.float32).reshape(shape), cotangents[0].reshape(shape)
    used = jnp.expand_dims(stored(scale, grid, reduced[0]).astype(jnp.float32), axis)
    raw = unclipped(view, used, fmt)
    codes = jnp.clip(raw, fmt.code_min, fmt.code_max)
    inside = raw == codes
    ratio = view / jnp.where(used == 0, 1.0, used)
    follows = jnp.where(inside, ratio, 0.0) if gradient != "held" else 0.0
    slope = codes - fmt.zero - follows
    gain = (shape[axis] * max(abs(fmt.lowest), abs(fmt.highest))) ** -0.5
    d_scale = gain * jnp.sum(jnp.where(used == 0, 0.0, g * slope), axis=axis)
    passes = inside if gradient == "clipped" else gradient == "straight"
    passed = jnp.where(passes, g, 0.0)
    d_w = passed.reshape(w.shape).astype(w.dtype)
    return d_w, d_scale.astype(scale.dtype)


fake_quantize_learned.defvjp(_forward_learned, _backward_learned)


def on_grid(
    w: jax.Array, scale: jax.Array | None, plan: Plan, reduced: tuple[int, ...]
) -> tuple[jax.Array, QArray]:
    """Returns (dequantized weight, its codes and scales) as the plan says; `scale` is the leaf beside it, if any.

    Shapes: as `fake_quantize` and `fake_quantize_learned`.
    """
    if scale is None:
        return fake_quantize(w, plan.weight, reduced)
    if plan.scales == "frozen":
        scale = jax.lax.stop_gradient(scale)
    return fake_quantize_learned(w, scale, plan.weight, reduced, plan.gradient)
