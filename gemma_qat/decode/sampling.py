"""From logits to the next token: greedy, or drawn from the softmax, cut to the likeliest k and to a mass of p."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gemma_qat.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is drawn.

    `temperature` 0 takes the likeliest. Else tokens are drawn from softmax(logits / temperature), cut to the `top_k`
    likeliest (0: all), then to the fewest of those whose mass reaches `top_p` of theirs (1: all). The same `seed` draws
    the same tokens.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise InputError(f"temperature {self.temperature} given, 0 or more expected")
        if self.top_k < 0:
            raise InputError(f"top_k {self.top_k} given, 0 (all tokens) or more expected")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p {self.top_p} given, more than 0 and at most 1 expected")
        if (
            not 0 <= self.seed < 2**32
        ):  # jax's keys take 32 bits, and others draw as one of these does
            raise InputError(f"seed {self.seed} given, 0 to 2^32 - 1 expected")

    @property
    def candidates(self) -> int:
        """How many of the likeliest tokens are looked at; 0: all."""
        return 1 if self.temperature == 0 else self.top_k


def draw(logits: Float[Array, "B C"], sampling: Sampling, key: jax.Array) -> Int[Array, "B"]:
    """Returns the place of one candidate per row; logits fall from left to right where they are to be cut by mass."""
    if sampling.temperature == 0.0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    scaled = logits / sampling.temperature
    if sampling.top_p < 1:
        mass = jnp.cumsum(jax.nn.softmax(scaled, axis=-1), axis=-1)
        # A candidate stays while the mass before it is short of p: the first always does.
        before = mass - jax.nn.softmax(scaled, axis=-1)
        scaled = jnp.where(before < sampling.top_p, scaled, -jnp.inf)
    if key.ndim:  # a key a row
        return jax.vmap(jax.random.categorical)(key, scaled).astype(jnp.int32)
    return jax.random.categorical(key, scaled, axis=-1).astype(jnp.int32)


def sample(logits: Float[Array, "B V"], sampling: Sampling, key: jax.Array) -> Int[Array, "B"]:
    """Returns one token per row of all logits."""
    count = sampling.candidates or logits.shape[-1]
    if sampling.candidates in (0, 1) and sampling.top_p == 1:
        return draw(logits, sampling, key)
    values, tokens = jax.lax.top_k(logits, min(count, logits.shape[-1]))
    return pick(tokens, draw(values, sampling, key))


def pick(tokens: Int[Array, "B C"], places: Int[Array, "B"]) -> Int[Array, "B"]:
    """Returns the tokens at `places`, one a row."""
    return jnp.take_along_axis(tokens, places[:, None], axis=1)[:, 0].astype(jnp.int32)
