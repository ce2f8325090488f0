"""What training minimizes: cross-entropy, or the divergence from the float model's probabilities.

    ce    mean over targets of -log p(target)
    kl    mean over targets of KL(teacher || student) = sum_v t_v (log t_v - log p_v), temperature 1, whole vocabulary

Both are computed over chunks of positions from final hidden states, each chunk recomputed in the backward pass, so that
no array of [B, T, V] is ever held: with 262144 words it would be larger than the model.

Source: distillation from the unquantized checkpoint's probabilities is what the Gemma 3 QAT models were trained with
(Gemma 3 technical report, arXiv 2503.19786).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gemma_qat.models.gemma4 import Gemma4

Scores = dict[str, Float[Array, "..."]]


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


def token_scores(
    student: Gemma4,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    teacher: Gemma4 | None = None,
    teacher_hidden: Float[Array, "B T D"] | None = None,
) -> Scores:
    """Returns per-token nll, and with a teacher also its nll, kl and whether the most likely tokens agree.

    Shapes: every score float32 [B, T].
    """
    logits = student.logits(hidden)
    scores: Scores = {"nll": cross_entropy(logits, targets)}
    if teacher is not None and teacher_hidden is not None:
        reference = jax.lax.stop_gradient(teacher.logits(teacher_hidden))
        scores["kl"] = divergence(reference, logits)
        scores["teacher_nll"] = cross_entropy(reference, targets)
        same = jnp.argmax(reference, axis=-1) == jnp.argmax(logits, axis=-1)
        scores["agree"] = same.astype(jnp.float32)
    return scores


def chunked(score: Callable[..., Scores], arrays: list[Any], chunk: int) -> Scores:
    """Returns `score(*arrays)` computed over `chunk` positions at a time (axis 1), each recomputed when differentiated.

    Raises: ValueError when the chunk does not divide the positions.
    """
    length = arrays[0].shape[1]
    if chunk == 0 or chunk >= length:
        return score(*arrays)
    if length % chunk:
        raise ValueError(f"loss chunk of {chunk} positions does not divide rows of {length}")

    def split(x: jax.Array) -> jax.Array:
        parts = x.reshape(x.shape[0], length // chunk, chunk, *x.shape[2:])
        return jnp.moveaxis(parts, 1, 0)

    step = jax.checkpoint(lambda _, parts: (None, score(*parts)))
    _, scores = jax.lax.scan(step, None, [split(x) for x in arrays])
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], length), scores)


LOSSES: dict[str, str] = {"ce": "nll", "kl": "kl"}
"""Name of a loss -> the per-token score it averages."""
