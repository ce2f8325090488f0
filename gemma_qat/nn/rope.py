"""Rotary positions over the two halves of a head.

For a head of width H, base theta and rotary fraction f, at position p:

    n_rot = int(f * H // 2)
    omega_j = theta^(-2 j / H)   for j < n_rot       (the exponent's denominator is the full head width)
    omega_j = 0                  for n_rot <= j < H/2 (those pairs do not rotate)
    [u, v] = halves of the head;   out = [u cos - v sin, v cos + u sin]

Pairs are (j, j + H/2). A global head with f = 0.25 therefore rotates dimensions 0..63 and 256..319 of 512: this is not
"rotate the first quarter". Angles, sines and cosines are float32.

Source: `proportional` rope in huggingface/transformers `modeling_rope_utils.py`; google-deepmind/gemma.
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Base and rotary fraction of one kind of layer."""

    theta: float
    fraction: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.theta < math.inf or not 0 <= self.fraction <= 1:
            raise ValueError(
                f"rope of base {self.theta} and fraction {self.fraction}, a finite positive base and 0 to 1 expected"
            )

    def frequencies(self, width: int) -> np.ndarray:
        """Returns omega for each of the width/2 pairs, float32."""
        rotating = int(self.fraction * width // 2)
        exponent = -2.0 * np.arange(width // 2) / width
        omega = np.where(np.arange(width // 2) < rotating, float(self.theta) ** exponent, 0.0)
        return omega.astype(np.float32)


def rotate(
    x: Float[Array, "B T N H"], positions: Int[Array, "B T"], rope: Rope
) -> Float[Array, "B T N H"]:
    """Returns the heads rotated to their positions, in the dtype of `x`."""
    omega = jnp.asarray(rope.frequencies(x.shape[-1]))
    angle = positions.astype(jnp.float32)[:, :, None, None] * omega[None, None, None, :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    u, v = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([u * cos - v * sin, v * cos + u * sin], axis=-1).astype(x.dtype)
