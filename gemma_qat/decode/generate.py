"""Generation through the key/value cache: one prefill, then one jitted step per token.

Prompts of different lengths are padded on the left; positions start at 0 on the first real token, so a row's
result does not depend on its neighbours. Sliding layers keep a ring of their window's size, KV-sharing
layers keep nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_qat.decode.sampling import sample
from gemma_qat.errors import InputError
from gemma_qat.models.gemma4 import Gemma4
from gemma_qat.nn.module import merge, split

Prompts = Sequence[Any] | np.ndarray | jax.Array
"""One list (or array) of token ids per row, of any integer type."""


def generate(
    model: Gemma4,
    prompt_tokens: Prompts,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    stop_tokens: Sequence[int] = (),
) -> np.ndarray:
    """Returns the new tokens, int32 [B, max_new_tokens]; after a stop token a row is filled with 0.

    Raises: InputError for an empty prompt, a token outside the vocabulary, a length beyond the model's positions, fewer
        than one new token, or a negative temperature.
    """
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens {max_new_tokens} given, at least 1 expected")
    if temperature < 0:
        raise InputError(f"temperature {temperature} given, 0 or more expected")
    tokens, segments = _left_padded(model, prompt_tokens, max_new_tokens)
    graph, state = split(model)
    caches = model.empty_caches(len(tokens), tokens.shape[1] + max_new_tokens)
    key = jax.random.key(seed)
    positions = np.maximum(np.cumsum(segments, axis=1, dtype=np.int32) - 1, 0)
    logits, caches = _prefill(graph, state, tokens, positions, segments, caches)
    out, done = [], np.zeros(len(tokens), bool)
    for index in range(max_new_tokens):
        picked = sample(logits, temperature, jax.random.fold_in(key, index))
        host = np.where(done, 0, np.asarray(picked))
        out.append(host)
        done |= np.isin(host, np.asarray(stop_tokens, np.int32)) if len(stop_tokens) else False
        if done.all() or index + 1 == max_new_tokens:
            break
        positions = positions[:, -1:] + 1
        logits, caches = _step(graph, state, picked[:, None], positions, caches)
    result = np.zeros((len(tokens), max_new_tokens), np.int32)
    result[:, : len(out)] = np.stack(out, axis=1)
    return result


def _left_padded(model: Gemma4, prompts: Prompts, new: int) -> tuple[np.ndarray, np.ndarray]:
    rows = [np.asarray(row) for row in prompts]
    vocab = model.config.vocab_size
    for number, row in enumerate(rows):
        if row.ndim != 1 or not row.size or row.dtype.kind not in "iu":
            raise InputError(f"prompt {number}: a non-empty list of integer tokens expected")
        outside = row[(row < 0) | (row >= vocab)]
        if outside.size:
            raise InputError(
                f"prompt {number}: token {outside[0]} is outside the vocabulary of {vocab}"
            )
    if not rows:
        raise InputError("at least one prompt expected, none given")
    length = max(row.size for row in rows)
    if length + new > model.config.max_positions:
        raise InputError(
            f"{length} prompt tokens and {new} new ones exceed the model's {model.config.max_positions} positions"
        )
    tokens = np.zeros((len(rows), length), np.int32)
    segments = np.zeros_like(tokens)
    for number, row in enumerate(rows):
        tokens[number, length - row.size :] = row
        segments[number, length - row.size :] = 1
    return tokens, segments


@functools.partial(jax.jit, static_argnums=0)
def _prefill(
    graph: Any, state: Any, tokens: Any, positions: Any, segments: Any, caches: Any
) -> tuple[jax.Array, Any]:
    model = merge(graph, state)
    hidden, caches = model.hidden(tokens, positions, segments, caches, empty_cache=True)
    return model.logits(hidden[:, -1:])[:, 0], caches


@functools.partial(jax.jit, static_argnums=0, donate_argnums=4)
def _step(
    graph: Any, state: Any, tokens: Any, positions: Any, caches: Any
) -> tuple[jax.Array, Any]:
    model = merge(graph, state)
    hidden, caches = model.hidden(tokens, positions, jnp.ones_like(tokens), caches)
    return model.logits(hidden)[:, 0], caches
