"""Real numbers to codes, the one place where rounding happens.

Three roundings exist, and each is a definition, not an approximation of another:

* `even`: c = round_half_even(x * inv + zero) with inv = 1 / s in float32.
* `up` (ggml's q4_0): c = trunc(x * inv + 8.5) with inv = 1 / d in float32.
* `away` (ggml's q8_0): c = round_half_away_from_zero(x * inv) with inv = 1 / d in float32.

All multiply by the reciprocal, on purpose: XLA rewrites a division by a broadcast scale into just that, whether or not
it compiles a whole function, and `x / s` would mean one thing where the rewrite sees the broadcast and another where it
does not. The two differ by one float32 rounding, which moves exact ties (1.3203125 / 0.203125 is 6.5, the product
6.5000005).

The product is rounded to float32 before the sum is. A compiler that contracts the two into one fused multiply-add
changes codes on ties and on bfloat16-valued weights. XLA does contract it on CPU, through optimization barriers too.
Clipping the product between the two operations, to twice the largest level (16 for q4_0), keeps them apart and changes
nothing: |x| <= 8 |d| up to rounding for recomputed scales, and with smaller, learned scales everything beyond saturates
anyway. With zero = 0 and halves to even there is no sum; `away` may be lowered to one (a processor has no such
instruction), so its product is clipped too.

Exactness: as jitted, `up` equals `gguf.quants.Q4_0` and `away` equals `gguf.quants.Q8_0` bit for bit wherever d is a
normal float32; tests hold them to that on random, bfloat16-valued and exact-tie tiles.
Source: `quantize_row_q4_0_ref`, `quantize_row_q8_0_ref` in ggml-org/llama.cpp (ggml/src/ggml-quants.c).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from gemma_qat.numerics.formats import Format


def unclipped(
    x: Float[Array, "..."], scale: Float[Array, "..."], fmt: Format
) -> Float[Array, "..."]:
    """Returns the code of each element before it is clipped to the format's range, as float32.

    `scale` has the rank of `x` (tiles broadcast). Where it is 0 the result is the zero code.
    """
    safe = jnp.where(scale == 0, 1.0, scale)
    product = x * (1.0 / safe)
    if fmt.zero or fmt.ties == "away":
        bound = 2 * max(abs(fmt.lowest), abs(fmt.highest))
        product = jnp.clip(product, -bound, bound)
    if fmt.ties == "up":
        rounded = jnp.floor(product + (fmt.zero + 0.5))
    elif fmt.ties == "away":
        rounded = jax.lax.round(product, jax.lax.RoundingMethod.AWAY_FROM_ZERO)
    else:
        rounded = jnp.round(product + fmt.zero) if fmt.zero else jnp.round(product)
    return jnp.where(scale == 0, float(fmt.zero_code), rounded)


def to_codes(x: Float[Array, "..."], scale: Float[Array, "..."], fmt: Format) -> Int8[Array, "..."]:
    """Returns the code of each element, clipped to the format's range.

    Shapes: x and scale of equal rank, scale broadcasting over the elements of a tile.
    Exactness: floor and ggml's trunc agree because every clipped argument of a code > 0 is positive.
    """
    codes = jnp.clip(unclipped(x, scale, fmt), fmt.code_min, fmt.code_max)
    return codes.astype(jnp.int8)


def from_codes(
    codes: Int8[Array, "..."], scale: Float[Array, "..."], fmt: Format
) -> Float[Array, "..."]:
    """Returns the float32 value each code stands for: (code - zero) * scale, one rounding."""
    return (codes.astype(jnp.float32) - fmt.zero) * scale.astype(jnp.float32)
