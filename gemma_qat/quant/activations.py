"""Rounding what is made on the way: activations, keys and values.

    static (per tensor)    c = clip(round_half_even(x / s), -2^(b-1), 2^(b-1) - 1)      value = c * s
                           s calibrated and stored; s = 0 means "not calibrated" and leaves x alone
    dynamic (per token)    s = absmax / (2^(b-1) - 1) over a token's contracted axes, c and value as above
    dynamic (per tile)     ggml's Q8_0 of 32 contracted elements: c against absmax / 127, value with that as float16

Gradients:

    static     dx = g where the code did not saturate, else 0
               ds = gain * sum g * (c - x / s where not saturated, c where saturated)
               gain = (features * highest)^-1/2, features those of one token: the sum does not depend on how a batch
               is cut into chunks, microbatches or shards
    dynamic    dx = g: by construction nothing saturates

As everywhere, `x / s` is a product with the float32 reciprocal (see `numerics/rounding.py`): libraries that truly
divide agree but for ties.

Tiles are rounded by the format `q8_0` itself. llama.cpp rounds the input of a Q4_0, Q8_0 or Q2_0 matrix so before it
multiplies; its vector code sends halves to the even code where the format sends them away from zero.

Sources: `quantize_row_q8_0` in ggml-org/llama.cpp (ggml-quants.c, and ggml-cpu/arch/x86/quants.c); static rounding of
inputs and outputs as in huggingface/transformers `integrations/gemma_quant.py`; ds and its gain after Esser et al.,
Learned Step Size Quantization (arXiv 1902.08153).
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gemma_qat.numerics import Grid, quantize

_TINY = float(np.finfo(np.float32).tiny)


def _codes(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Unclipped codes, float32; `scale` has no zeros and broadcasts by its sizes of 1."""
    return jnp.round(x.astype(jnp.float32) * (1.0 / scale))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def round_static(
    x: Float[Array, "..."], scale: Float[Array, "1"], highest: int
) -> Float[Array, "..."]:
    """Returns `x` rounded to codes -highest - 1 .. highest of a stored scale, in the dtype of `x`.

    Shapes: scale [1], float32; 0 returns `x` as it is.
    Exactness: (code * scale) is one float32 product, then one rounding to the dtype of `x`.
    """
    wide = scale.astype(jnp.float32).reshape((1,) * x.ndim)
    safe = jnp.where(wide == 0, 1.0, wide)
    codes = jnp.clip(_codes(x, safe), -highest - 1, highest)
    return jnp.where(wide == 0, x, (codes * safe).astype(x.dtype))


def static_codes(
    x: Float[Array, "..."], scale: Float[Array, "1"], highest: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (`round_static`, its codes int8, the scale float32 with size 1 along every axis); the scale is not 0."""
    wide = scale.astype(jnp.float32).reshape((1,) * x.ndim)
    codes = jnp.clip(_codes(x, wide), -highest - 1, highest).astype(jnp.int8)
    return round_static(x, scale, highest), jax.lax.stop_gradient(codes), wide


def round_again(
    x: Float[Array, "..."], scale: Float[Array, "1"], highest: int
) -> Float[Array, "..."]:
    """Returns `round_static`, the same bits, for a backward pass that is to round anew; it has no gradient.

    The codes go through int8: a compiler that merges equal expressions would otherwise find the forward pass's rounded
    array, and hold it until here.
    """
    wide = scale.astype(jnp.float32).reshape((1,) * x.ndim)
    safe = jnp.where(wide == 0, 1.0, wide)
    codes = jnp.clip(_codes(x, safe), -highest - 1, highest).astype(jnp.int8)
    return jnp.where(wide == 0, x, (codes.astype(jnp.float32) * safe).astype(x.dtype))


def _static_forward(x: jax.Array, scale: jax.Array, highest: int):
    return round_static(x, scale, highest), (x, scale)


def _static_backward(highest: int, residuals, g: jax.Array):
    x, scale = residuals
    wide = scale.astype(jnp.float32).reshape((1,) * x.ndim)
    safe = jnp.where(wide == 0, 1.0, wide)
    raw = _codes(x, safe)
    codes = jnp.clip(raw, -highest - 1, highest)
    inside = raw == codes
    slope = codes - jnp.where(inside, x.astype(jnp.float32) * (1.0 / safe), 0.0)
    features = math.prod(x.shape[min(2, x.ndim - 1) :])  # of [B, T, ...], or of rows [C, R]
    gain = (features * highest) ** -0.5
    total = gain * jnp.sum(g.astype(jnp.float32) * slope)
    d_scale = jnp.where(scale == 0, 0.0, total[None]).astype(scale.dtype)
    return jnp.where((wide == 0) | inside, g, 0.0).astype(x.dtype), d_scale


round_static.defvjp(_static_forward, _static_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def round_dynamic(
    x: Float[Array, "..."], axes: tuple[int, ...], highest: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (rounded x in its dtype, codes int8, scales float32), one scale per slice over `axes`.

    Shapes: codes as `x`; scales with size 1 along `axes`. A slice of zeros has scale 1 and codes 0.
    """
    extremum = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=axes, keepdims=True)
    scale = extremum * (np.float32(1) / np.float32(highest))
    scale = jnp.where(scale < _TINY, 1.0, scale)
    codes = jnp.clip(_codes(x, scale), -highest - 1, highest)
    return (codes * scale).astype(x.dtype), codes.astype(jnp.int8), scale


def _dynamic_forward(x: jax.Array, axes: tuple[int, ...], highest: int):
    return round_dynamic(x, axes, highest), None


def _dynamic_backward(axes: tuple[int, ...], highest: int, residuals: None, cotangents):
    del axes, highest, residuals
    return (cotangents[0],)


round_dynamic.defvjp(_dynamic_forward, _dynamic_backward)


TILES = Grid(format="q8_0")
"""What activations in tiles are rounded to."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def round_tiles(x: Float[Array, "..."], axes: tuple[int, ...]) -> Float[Array, "..."]:
    """Returns `x` rounded to ggml's Q8_0 along its merged last axes `axes`, in the dtype of `x`.

    Raises: ValueError when 32 does not divide the product of the axes.
    Exactness: one float32 product a code, as `QArray.dequantize`, then one rounding to the dtype of `x`.
    """
    return quantize(x, TILES, axes, where="activations").dequantize().astype(x.dtype)


def _tiles_forward(x: jax.Array, axes: tuple[int, ...]):
    return round_tiles(x, axes), None


def _tiles_backward(axes: tuple[int, ...], residuals: None, g: jax.Array):
    del axes, residuals
    return (g,)


round_tiles.defvjp(_tiles_forward, _tiles_backward)
