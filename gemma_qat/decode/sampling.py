"""From logits to the next token."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def sample(logits: Float[Array, "B V"], temperature: float, key: jax.Array) -> Int[Array, "B"]:
    """Returns one token per row: the likeliest at temperature 0, else drawn from softmax(logits / temperature)."""
    if temperature == 0.0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.random.categorical(key, logits / temperature, axis=-1).astype(jnp.int32)
