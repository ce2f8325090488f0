"""Generation through the key/value cache: a prefill, then one jitted step per token.

Prompts of different lengths are padded on the left; positions start at 0 on the first real token, so a row's
result does not depend on its neighbours. Sliding layers keep a ring of their window's size, KV-sharing
layers keep nothing. The cache is donated to every step: it is written in place.

A step draws its token on the device and the next one starts from there; the host reads a token while the following
step runs, so it may have started one step that nobody needs when all rows have ended.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from gemma_qat.decode.prompts import Prompts, left_padded
from gemma_qat.decode.sampling import Sampling, draw, pick, sample
from gemma_qat.errors import InputError, unknown
from gemma_qat.models.gemma4 import Gemma4
from gemma_qat.nn.module import merge, split

CACHES = ("float", "float32", "bfloat16", "int8", "int4")
"""What keys and values may be kept in; float: the activations' dtype."""


def generate(
    model: Gemma4,
    prompt_tokens: Prompts,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop_tokens: Sequence[int] = (),
    cache: str = "float",
    chunk: int = 0,
    keys: jax.Array | None = None,
) -> np.ndarray:
    """Returns the new tokens, int32 [B, max_new_tokens]; after a stop token a row is filled with 0.

    `keys`, a key [B] a row instead of the seed: what a row draws does not depend on its neighbours then.

    Raises: InputError as `stream` does.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    steps = stream(
        model, prompt_tokens, max_new_tokens=max_new_tokens, sampling=sampling,
        stop_tokens=stop_tokens, cache=cache, chunk=chunk, keys=keys,
    )  # fmt: skip
    out = [*steps]
    result = np.zeros((len(out[0]), max_new_tokens), np.int32)
    result[:, : len(out)] = np.stack(out, axis=1)
    return result


def stream(
    model: Gemma4,
    prompt_tokens: Prompts,
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    stop_tokens: Sequence[int] = (),
    cache: str = "float",
    chunk: int = 0,
    length: int = 0,
    keys: jax.Array | None = None,
) -> Iterator[np.ndarray]:
    """Yields the next token of every row, int32 [B], as it is known; 0 for rows that have ended, until all have.

    `cache` is what keys and values are kept in: float, bfloat16, int8 or int4 (a scale per head and token, or a
    site's static ones). `chunk` tokens of the prompts are read at a time; 0 reads them all at once. Prompts are padded
    to at least `length` tokens: calls with others of up to that many compile nothing.
    Raises: InputError before the first token for an empty prompt, a token outside the vocabulary, a length beyond the
        model's positions, fewer than one new token, or a cache or chunk that there is none of.
    """
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens {max_new_tokens} given, at least 1 expected")
    if cache not in CACHES:
        raise unknown("cache", cache, CACHES)
    if chunk < 0:
        raise InputError(f"chunk {chunk} given, 0 (all at once) or more expected")
    tokens, segments = left_padded(model.config, prompt_tokens, max_new_tokens, chunk or 1, length)
    key = jax.random.key(sampling.seed) if keys is None else keys
    sampling = dataclasses.replace(sampling, seed=0)  # it is in the key: another compiles nothing
    return _stream(
        model, tokens, segments, max_new_tokens, sampling, key, stop_tokens, cache, chunk
    )


def _stream(
    model: Gemma4, tokens: np.ndarray, segments: np.ndarray, new: int, sampling: Sampling,
    key: jax.Array, stop_tokens: Sequence[int], cache: str, chunk: int,
) -> Iterator[np.ndarray]:  # fmt: skip
    graph, state = split(model)
    length = tokens.shape[1] + new
    caches = model.empty_caches(len(tokens), length, None if cache == "float" else cache)
    positions = np.maximum(np.cumsum(segments, axis=1, dtype=np.int32) - 1, 0)
    chunk = chunk or tokens.shape[1]
    hidden: Any = None
    for start in range(0, tokens.shape[1], chunk):
        part = slice(start, start + chunk)
        hidden, caches = _prefill(
            graph, state, start == 0, tokens[:, part], positions[:, part], segments[:, part], caches
        )
    picked = _first(graph, state, sampling, hidden, _folded(key, 0))
    stops, done = np.asarray(stop_tokens, np.int32), np.zeros(len(tokens), bool)
    ends = positions[:, -1:]

    def step(index: int, picked: jax.Array) -> jax.Array:
        nonlocal caches
        after = _folded(key, index)
        picked, caches = _step(graph, state, sampling, picked[:, None], ends + index, caches, after)
        return picked

    for index in range(1, new + 1):
        # The first token is handed over at once: the step has yet to be compiled.
        following = step(index, picked) if 1 < index < new else picked
        host = np.where(done, 0, np.asarray(picked))
        yield host
        done |= np.isin(host, stops)
        if done.all():
            return
        picked = step(index, picked) if index == 1 < new else following


@jax.jit
def _folded(key: jax.Array, index: Any) -> jax.Array:
    """The key of a step, or of every row's."""
    return (
        jax.vmap(jax.random.fold_in, (0, None))(key, index)
        if key.ndim
        else jax.random.fold_in(key, index)
    )


@functools.partial(jax.jit, static_argnums=(0, 2), donate_argnums=6)
def _prefill(
    graph: Any, state: Any, first: bool, tokens: Any, positions: Any, segments: Any, caches: Any
) -> tuple[jax.Array, Any]:
    model = merge(graph, state)
    hidden, caches = model.hidden(tokens, positions, segments, caches, empty_cache=first)
    return hidden[:, -1:], caches


@functools.partial(jax.jit, static_argnums=(0, 2))
def _first(graph: Any, state: Any, sampling: Sampling, hidden: Any, key: Any) -> jax.Array:
    return _next(merge(graph, state), hidden, sampling, key)


@functools.partial(jax.jit, static_argnums=(0, 2), donate_argnums=5)
def _step(
    graph: Any, state: Any, sampling: Sampling, tokens: Any, positions: Any, caches: Any, key: Any
) -> tuple[jax.Array, Any]:
    model = merge(graph, state)
    hidden, caches = model.hidden(tokens, positions, None, caches)
    return _next(model, hidden, sampling, key), caches


def _next(model: Gemma4, hidden: jax.Array, sampling: Sampling, key: jax.Array) -> jax.Array:
    """The next token of every row, from hidden states [B, 1, D]."""
    count = min(sampling.candidates, model.config.vocab_size)
    if not count:
        return sample(model.logits(hidden)[:, 0], sampling, key)
    values, tokens = model.top(hidden, count)
    return pick(tokens[:, 0], draw(values[:, 0], sampling, key))
