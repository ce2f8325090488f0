"""What training minimizes: cross-entropy, or a divergence from the float model's probabilities.

    ce          mean over targets of -log p(target)
    kl          mean over targets of KL(teacher || student), temperature 1, whole vocabulary
    reverse_kl, js, cakld       other divergences, defined with their gradients in `divergences.py`

Of a teacher whose most likely words were kept on disk only, with their probabilities, the rest is one outcome more:

    kl    sum_topk t_v (log t_v - log p_v) + t_rest (log t_rest - log p_rest)         p_rest = sum of all other p_v

which is never larger than the whole divergence, and 0 where the student agrees on every kept word.

The gradients with respect to the student's logits are closed, and are what `objective.py` sends back: that of ce is
p - onehot(target). Whatever is minimized, nll is reported, and beside a teacher kl and how often the most likely words
agree.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gemma_qat.train.divergences import (
    DIVERGENCES,
    TopK,
    forward,
    of_kept,
    of_words,
    over_words,
)

Scores = dict[str, Float[Array, "..."]]
Score = Callable[[jax.Array, jax.Array, Any], tuple[Scores, jax.Array]]
"""(logits, targets, teacher) -> (per-token scores, gradient of the loss with respect to the logits)."""


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
    no_targets = jnp.zeros(student.shape[:-1], jnp.int32)
    return forward(of_kept(teacher, jax.nn.log_softmax(student), no_targets))[0]


def score_ce(
    logits: Float[Array, "B T V"], targets: Int[Array, "B T"], teacher: Any
) -> tuple[Scores, Float[Array, "B T V"]]:
    """Returns per-token scores and the gradient of the cross-entropy with respect to the logits."""
    log_s = jax.nn.log_softmax(logits)
    scores = _shared_scores(log_s, targets, teacher)
    hit = jnp.arange(logits.shape[-1])[None, None] == targets[..., None]
    return scores, jnp.exp(log_s) - hit


def _score(name: str) -> Score:
    """Returns the function of a divergence; its teacher is logits [B, T, V], or what is kept of them (`TopK`)."""

    def score(
        logits: Float[Array, "B T V"], targets: Int[Array, "B T"], teacher: Any
    ) -> tuple[Scores, Float[Array, "B T V"]]:
        log_s = jax.nn.log_softmax(logits)
        kept = isinstance(teacher, tuple)
        outcomes = (of_kept if kept else of_words)(teacher, log_s, targets)
        value, gradient = DIVERGENCES[name](outcomes)
        if kept:
            gradient = over_words(gradient, outcomes, teacher[0], jnp.exp(log_s))
        return {name: value} | _shared_scores(log_s, targets, teacher), gradient

    return score


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


class Loss(NamedTuple):
    """What a loss averages over targets, by the name of the per-token score, and what gives scores and gradient."""

    averaged: str
    score: Score
    has_teacher: bool


LOSSES: dict[str, Loss] = {"ce": Loss("nll", score_ce, False)} | {
    name: Loss(name, _score(name), True) for name in DIVERGENCES
}
"""What `train.loss` may be."""


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
