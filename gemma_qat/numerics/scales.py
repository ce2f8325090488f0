"""Where a tile's scale comes from when it comes from the weights, and how scales are rounded for storage.

Absmax (or the signed extremum) keeps the largest element exact and pays for it everywhere else; `search.py` has the
alternatives. Absmean is for ternary codes, where the mean magnitude is a threshold as well as a step.

Products, not quotients, for the reason given in `rounding.py`: extremum * (1 / divisor). Where ggml's bytes are to be
met and the divisor is no power of two (q8_0: 127) the quotient itself is wanted, and as XLA would turn a division into
the product, the product is corrected by its remainder instead (`_quotient`).

Sums are made pairwise, so that every compiler adds in the same order.

A tile whose scale would be a subnormal float32, or 0 in its stored type, has no usable grid: it gets the format's
`empty_scale` and its codes stand for zeros.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gemma_qat.numerics.formats import Grid

TINY = float(np.finfo(np.float32).tiny)
"""Smallest normal float32; no scale is closer to zero."""


def from_weights(view: Float[Array, "..."], axis: int, grid: Grid) -> Float[Array, "..."]:
    """Returns the float32 scale of each tile as its format takes it from the weights, not yet rounded for storage.

    Shapes: view [..., Q, tile at `axis`, ...]; result without that axis.
    """
    fmt = grid.number
    if fmt.scale_rule == "absmean":
        scale = pairwise_sum(jnp.abs(view), axis) * np.float32(
            1 / (view.shape[axis] * grid.divisor)
        )
    else:
        scale = _divided(_extremum(view, axis, grid), grid)
    unusable = (jnp.abs(scale) < TINY) | (stored(scale, grid, axis - 1) == 0)
    # A zero keeps its sign: ggml writes d = 0 / -8 = -0.0 for a tile of zeros.
    return jnp.where(unusable, fmt.empty_scale or jnp.copysign(0.0, scale), scale)


def stored(scale: Float[Array, "..."], grid: Grid, axis: int) -> Float[Array, "..."]:
    """Returns float32 scales as they are stored; `axis` is that of the tiles.

    On a two-level grid each super-block of tiles gets one float16 d and each of its tiles an integer sc in -128 .. 127,
    as in ggml: with m the scale of largest magnitude (the first one on ties), i = -128 / m, d = float16(1 / i) and
    sc = round(i * scale), halves to even. The result is d * sc in float32, with zeros positive.

    Shapes: scale [..., Q at `axis`, ...]; result the same, in the grid's scale dtype.
    Exactness: doing it again changes no bit, whatever d is: m becomes -128 d, and 1 / i rounds to d again.
    Source: `quantize_row_q6_K_ref` in ggml-org/llama.cpp (ggml/src/ggml-quants.c).
    """
    if not grid.two_level:
        return scale.astype(jnp.dtype(grid.scale_dtype))
    count, shape = grid.number.super_tiles, scale.shape
    blocks = scale.reshape(*shape[:axis], shape[axis] // count, count, *shape[axis + 1 :])
    top = _first_largest(blocks, axis + 1)
    # Not -128 / top: XLA makes a product of a division by a division.
    inverse = -128.0 * (1.0 / jnp.where(top == 0, 1.0, top))
    d = (1.0 / inverse).astype(jnp.float16).astype(jnp.float32)
    small = jnp.clip(jnp.round(inverse * blocks), -128.0, 127.0)
    product = jnp.where((top == 0) | (d == 0), 0.0, d * small)
    return jnp.where(product == 0, 0.0, product).reshape(shape)


def _extremum(view: Float[Array, "..."], axis: int, grid: Grid) -> Float[Array, "..."]:
    if grid.number.scale_rule == "signed_extremum":
        return _first_largest(view, axis).squeeze(axis)
    return jnp.max(jnp.abs(view), axis=axis)


def _first_largest(x: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
    """The element of largest magnitude along an axis, which stays with length 1."""
    index = jnp.argmax(jnp.abs(x), axis=axis, keepdims=True)
    return jnp.take_along_axis(x, index, axis=axis)


def _divided(x: Float[Array, "..."], grid: Grid) -> Float[Array, "..."]:
    if grid.number.codes_against == "unrounded":
        return _quotient(x, grid.divisor)
    return x * (np.float32(1) / np.float32(grid.divisor))


def _quotient(x: Float[Array, "..."], divisor: float) -> Float[Array, "..."]:
    """Returns x / divisor, correctly rounded, for a divisor of at most 12 bits.

    The product with the reciprocal is at most a step off. Split into 12 and 12 bits, its products with the divisor are
    exact, and so is the remainder; what it adds is far above the rounding of the correction. Without inexact products
    no contraction to fused operations can change it.
    """
    inverse = np.float32(1) / np.float32(divisor)
    near = x * inverse
    bits = jax.lax.bitcast_convert_type(near, jnp.uint32) & np.uint32(0xFFFFF000)
    high = jax.lax.bitcast_convert_type(bits, jnp.float32)
    remainder = (x - high * divisor) - (near - high) * divisor
    return near + remainder * inverse


def pairwise_sum(x: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
    """Returns the sum along an axis, halves added to each other until one element is left."""
    length = 1 << (x.shape[axis] - 1).bit_length()
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, length - x.shape[axis])
    x = jnp.pad(x, padding)
    while length > 1:
        length //= 2
        x = jax.lax.slice_in_dim(x, 0, length, axis=axis) + jax.lax.slice_in_dim(
            x, length, 2 * length, axis=axis
        )
    return x.squeeze(axis)
