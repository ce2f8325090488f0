"""What training minimizes: cross-entropy, or the divergence from the float model's probabilities.

    ce    mean over targets of -log p(target)
    kl    mean over targets of KL(teacher || student) = sum_v t_v (log t_v - log p_v), temperature 1, whole vocabulary

Of a teacher whose most likely words were kept on disk only, with their probabilities, the rest is one outcome more:

    kl    sum_topk t_v (log t_v - log p_v) + t_rest (log t_rest - log p_rest)         p_rest = sum of all other p_v

which is never larger than the whole divergence, and 0 where the student agrees on every kept word.

The gradients with respect to the student's logits are closed, and are what `objective.py` sends back:

    ce    p - onehot(target)
    kl    p - t                                                    whole vocabulary
          p - t on the kept words,  p (1 - t_rest / p_rest) on the others

Source: distillation from the unquantized checkpoint's probabilities is what the Gemma 3 QAT models were trained with
(Gemma 3 technical report, arXiv 2503.19786).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Scores = dict[str, Float[Array, "..."]]
TopK = tuple[jax.Array, jax.Array]
"""A teacher's most likely words: ids int32 [B, T, k] and their log probabilities float32 [B, T, k]."""

_TINY = 1e-30


def cross_entropy(logits: Float[Array, "B T V"], targets: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """Returns -log p(target), nats."""
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def divergence(
    teacher: Float[Array, "B T V"], student: Float[Array, "B T V"]
) -> Float[Array, "B T"]:
    """Returns KL(teacher || student) of two sets of logits, nats."""
    log_t, log_s = jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)
    return jnp.sum(jnp.exp(log_t) * (log_t - log_s), axis=-1)


def divergence_topk(teacher: TopK, student: Float[Array, "B T V"]) -> Float[Array, "B T"]:
    """Returns the divergence from a teacher of which the k most likely words are known, the rest as one outcome."""
    ids, log_t = teacher
    log_s = jax.nn.log_softmax(student)
    kept = jnp.take_along_axis(log_s, ids, axis=-1)
    inside = jnp.sum(jnp.exp(log_t) * (log_t - kept), axis=-1)
    rest = _rest(log_t)
    log_rest = jnp.log(jnp.maximum(rest, _TINY)) - _log_rest(log_s, ids)
    return inside + jnp.where(rest > 0, rest * log_rest, 0.0)


def _rest(log_t: jax.Array) -> jax.Array:
    """The teacher's probability outside its kept words; what float rounding leaves below 0 is 0."""
    return jnp.maximum(1.0 - jnp.sum(jnp.exp(log_t), axis=-1), 0.0)


def _log_rest(log_s: jax.Array, ids: jax.Array) -> jax.Array:
    """log of the student's probability outside `ids`, summed there and not taken as a difference from 1.

    Held above log(1e-30), so that a teacher of which every word was kept, but for rounding, has nothing to add.
    """
    outside = jax.nn.logsumexp(jnp.where(_is_kept(log_s, ids), -jnp.inf, log_s), axis=-1)
    return jnp.maximum(outside, np.log(_TINY))


def _is_kept(log_s: jax.Array, ids: jax.Array) -> jax.Array:
    return jnp.put_along_axis(jnp.zeros(log_s.shape, bool), ids, True, axis=-1, inplace=False)


def score_ce(
    logits: Float[Array, "B T V"], targets: Int[Array, "B T"], teacher: Any
) -> tuple[Scores, Float[Array, "B T V"]]:
    """Returns per-token scores and the gradient of the cross-entropy with respect to the logits."""
    log_s = jax.nn.log_softmax(logits)
    scores = _shared_scores(log_s, targets, teacher)
    hit = jnp.arange(logits.shape[-1])[None, None] == targets[..., None]
    return scores, jnp.exp(log_s) - hit


def score_kl(
    logits: Float[Array, "B T V"], targets: Int[Array, "B T"], teacher: Any
) -> tuple[Scores, Float[Array, "B T V"]]:
    """Returns per-token scores and the gradient of the divergence with respect to the logits.

    `teacher` is the teacher's logits [B, T, V], or what is kept of them (`TopK`).
    """
    log_s = jax.nn.log_softmax(logits)
    scores = _shared_scores(log_s, targets, teacher)
    p = jnp.exp(log_s)
    if not isinstance(teacher, tuple):
        return scores, p - jax.nn.softmax(teacher)
    ids, log_t = teacher
    ratio = _rest(log_t) * jnp.exp(-_log_rest(log_s, ids))
    kept = jnp.take_along_axis(p, ids, axis=-1) - jnp.exp(log_t)
    others = p * (1.0 - ratio[..., None])
    return scores, jnp.put_along_axis(others, ids, kept, axis=-1, inplace=False)


def _shared_scores(log_s: jax.Array, targets: jax.Array, teacher: Any) -> Scores:
    """What is reported whatever is minimized: nll, and beside a teacher kl and whether the most likely words agree."""
    scores: Scores = {"nll": -jnp.take_along_axis(log_s, targets[..., None], axis=-1)[..., 0]}
    if teacher is None:
        return scores
    if isinstance(teacher, tuple):
        ids, log_t = teacher
        scores["kl"] = divergence_topk(teacher, log_s)
        best = jnp.take_along_axis(ids, jnp.argmax(log_t, axis=-1)[..., None], axis=-1)[..., 0]
    else:
        scores["kl"] = divergence(teacher, log_s)
        scores["teacher_nll"] = cross_entropy(teacher, targets)
        best = jnp.argmax(teacher, axis=-1)
    scores["agree"] = (best == jnp.argmax(log_s, axis=-1)).astype(jnp.float32)
    return scores


Score = Callable[[jax.Array, jax.Array, Any], tuple[Scores, jax.Array]]
LOSSES: dict[str, tuple[str, Score]] = {"ce": ("nll", score_ce), "kl": ("kl", score_kl)}
"""Name of a loss -> the per-token score it averages, and the function that gives scores and gradient."""


def logit_scores(
    logits: Float[Array, "B T V"], targets: Int[Array, "B T"], teacher: Any = None
) -> Scores:
    """Returns per-token nll, and beside a teacher's logits its nll, kl and whether the most likely tokens agree.

    Shapes: every score float32 [B, T].
    """
    return _shared_scores(jax.nn.log_softmax(logits), targets, teacher)


def chunks(x: jax.Array, size: int) -> Float[Array, "..."] | Int[Array, "..."]:
    """Returns [B, T, ...] as [T / size, B, size, ...]; size 0 is T.

    Raises: ValueError when the chunk does not divide the positions.
    """
    length = x.shape[1]
    size = min(size, length) or length
    if length % size:
        raise ValueError(f"loss chunk of {size} positions does not divide rows of {length}")
    return jnp.moveaxis(x.reshape(x.shape[0], length // size, size, *x.shape[2:]), 1, 0)


def chunked(score: Callable[..., Scores], arrays: list[Any], size: int) -> Scores:
    """Returns `score(*arrays)` computed over `size` positions at a time (axis 1).

    Raises: ValueError when the chunk does not divide the positions.
    """
    if size == 0 or size >= arrays[0].shape[1]:
        return score(*arrays)
    _, scores = jax.lax.scan(
        lambda _, parts: (None, score(*parts)), None, [chunks(x, size) for x in arrays]
    )
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1), scores)
