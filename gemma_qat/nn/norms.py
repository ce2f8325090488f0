"""RMS normalization, in float32 whatever the activation's dtype.

    rms(x) = x * (mean(x^2) + eps)^(-1/2)        with a weight: rms(x) * w, a plain factor and not (1 + w)

Source: `Gemma4RMSNorm` in huggingface/transformers; google-deepmind/gemma `gm/nn/gemma4`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gemma_qat.nn.module import Leaves, Module, Param


def rms(
    x: Float[Array, "... D"], eps: float, weight: Float[Array, "D"] | None = None
) -> Float[Array, "... D"]:
    """Returns `x` over its root mean square along the last axis, times `weight` if there is one."""
    wide = x.astype(jnp.float32)
    out = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    if weight is not None:
        out = out * jnp.expand_dims(weight.astype(jnp.float32), tuple(range(x.ndim - 1)))
    return out.astype(x.dtype)


class RMSNorm(Module):
    """RMS normalization with a weight."""

    def __init__(self, leaves: Leaves, eps: float) -> None:
        self.weight = Param(leaves["weight"])
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Returns the normalized input, in its own dtype."""
        return rms(x, self.eps, self.weight.get_value())
