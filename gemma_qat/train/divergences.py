"""How far a student's probabilities are from a teacher's, with the gradient in closed form.

Of one token, with t the teacher's probabilities of outcomes o, p the student's, m = (t + p) / 2 and y the target:

    kl          F = sum t log(t / p)                               forward: p is held up wherever t is
    reverse_kl  R = sum p log(p / t)                               reverse: p is held down wherever t is small
    js          (sum t log(t / m) + sum p log(p / m)) / 2          symmetric, at most log 2
    cakld       g R + (1 - g) F,   g = t(y)                        reverse where the teacher is sure of the target

Their gradients with respect to the student's logits (of outcomes, p = softmax of them):

    kl          p - t
    reverse_kl  p (log(p / t) - R)
    js          p (log(p / m) - sum p log(p / m)) / 2
    cakld       g p (log(p / t) - R) + (1 - g) (p - t)             g is the teacher's: nothing flows into it

Outcomes are the words of the vocabulary or, of a teacher of which k words were kept, those and "any other word". The
probability of the latter is a sum over words, q, so the gradient of such a word's logit is its share p / q of the
outcome's. A divergence of merged outcomes is never larger than that of the words (data processing inequality); for
cakld where the target was kept: otherwise g is what the teacher gave to all words that were not, which is more.

Logarithms of ratios are differences of log probabilities, so a word that one side gives nothing stays finite as long
as its logit is. What a float32 sum of a teacher's kept words leaves to the others is not known below 2^-24: there its
logarithm, which the reverse divergence reads, is held.

Sources: forward KL from the unquantized checkpoint: Gemma 3 technical report (arXiv 2503.19786); reverse KL for
language models: MiniLLM (arXiv 2306.08543); cakld: BitDistiller (arXiv 2402.10631), g times the reverse divergence and
1 - g times the forward one. There g is one number, the mean over some batches of the data before training. Here it is
each token's own: its mean is the same, no pass over the data comes first, and nothing depends on how a batch is cut
into chunks, microbatches and shards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

TINY = 1e-30
LEAST_REST = 2.0**-24
"""Spacing of float32 numbers below 1: a smaller rest of a sum of probabilities is rounding."""

TopK = tuple[jax.Array, jax.Array]
"""A teacher's most likely words: ids int32 [B, T, k] and their log probabilities float32 [B, T, k]."""


class Outcomes(NamedTuple):
    """Probabilities of the same O outcomes by a teacher (t) and a student (p), and which of them the target is.

    Shapes: [B, T, O]; target int32 [B, T].
    """

    t: jax.Array
    log_t: jax.Array
    p: jax.Array
    log_p: jax.Array
    target: jax.Array


Found = tuple[Float[Array, "B T"], Float[Array, "B T O"]]
"""A divergence of every token, nats, and its gradient with respect to the logits of the outcomes."""


def forward(of: Outcomes) -> Found:
    """Returns KL(teacher || student)."""
    return jnp.sum(of.t * (of.log_t - of.log_p), axis=-1), of.p - of.t


def reverse(of: Outcomes) -> Found:
    """Returns KL(student || teacher)."""
    ratio = of.log_p - of.log_t
    score = jnp.sum(of.p * ratio, axis=-1)
    return score, of.p * (ratio - score[..., None])


def jensen_shannon(of: Outcomes) -> Found:
    """Returns the mean of KL(teacher || mean) and KL(student || mean)."""
    log_2 = np.float32(np.log(2))
    # log(p / m) = log 2 - log(1 + t / p)
    of_p = log_2 - jax.nn.softplus(of.log_t - of.log_p)
    of_t = log_2 - jax.nn.softplus(of.log_p - of.log_t)
    own = jnp.sum(of.p * of_p, axis=-1)
    score = (jnp.sum(of.t * of_t, axis=-1) + own) / 2
    return score, of.p * (of_p - own[..., None]) / 2


def confidence_weighted(of: Outcomes) -> Found:
    """Returns the reverse divergence where the teacher is sure of the target, the forward one where it is not."""
    sure = jnp.take_along_axis(of.t, of.target[..., None], axis=-1)
    (back, d_back), (ahead, d_ahead) = reverse(of), forward(of)
    g = sure[..., 0]
    return g * back + (1 - g) * ahead, sure * d_back + (1 - sure) * d_ahead


DIVERGENCES: dict[str, Callable[[Outcomes], Found]] = {
    "kl": forward,
    "reverse_kl": reverse,
    "js": jensen_shannon,
    "cakld": confidence_weighted,
}
"""Names as in the table above."""


def of_words(
    teacher: Float[Array, "B T V"], log_p: Float[Array, "B T V"], targets: Int[Array, "B T"]
) -> Outcomes:
    """Returns the outcomes of two models of the whole vocabulary: a teacher's logits, a student's log probabilities."""
    return Outcomes(
        jax.nn.softmax(teacher), jax.nn.log_softmax(teacher), jnp.exp(log_p), log_p, targets
    )


def of_kept(teacher: TopK, log_p: Float[Array, "B T V"], targets: Int[Array, "B T"]) -> Outcomes:
    """Returns k + 1 outcomes: the words that were kept of a teacher, and last any other."""
    ids, log_t = teacher
    rest = rest_of(log_t)[..., None]
    kept, others = jnp.take_along_axis(log_p, ids, axis=-1), log_rest(log_p, ids)[..., None]
    is_target = ids == targets[..., None]
    place = jnp.where(jnp.any(is_target, axis=-1), jnp.argmax(is_target, axis=-1), ids.shape[-1])
    log_rest_t = jnp.log(jnp.maximum(rest, LEAST_REST))
    log_q = jnp.concatenate([kept, others], axis=-1)
    return Outcomes(
        jnp.concatenate([jnp.exp(log_t), rest], axis=-1),
        jnp.concatenate([log_t, log_rest_t], axis=-1),
        jnp.exp(log_q), log_q, place,
    )  # fmt: skip


def over_words(
    gradient: Float[Array, "B T O"],
    of: Outcomes,
    ids: Int[Array, "B T k"],
    p: Float[Array, "B T V"],
) -> Float[Array, "B T V"]:
    """Returns the gradient of the words' logits from that of `of_kept` outcomes; `p` are the words' probabilities."""
    others = p * (gradient[..., -1:] / of.p[..., -1:])
    return jnp.put_along_axis(others, ids, gradient[..., :-1], axis=-1, inplace=False)


def rest_of(log_t: Float[Array, "B T k"]) -> Float[Array, "B T"]:
    """Returns the teacher's probability outside its kept words; what float rounding leaves below 0 is 0."""
    return jnp.maximum(1.0 - jnp.sum(jnp.exp(log_t), axis=-1), 0.0)


def log_rest(log_p: Float[Array, "B T V"], ids: Int[Array, "B T k"]) -> Float[Array, "B T"]:
    """Returns log of the student's probability outside `ids`, summed there and not taken as a difference from 1.

    Held above log(1e-30), so that a teacher of which every word was kept, but for rounding, has nothing to add.
    """
    kept = jnp.put_along_axis(jnp.zeros(log_p.shape, bool), ids, True, axis=-1, inplace=False)
    outside = jax.nn.logsumexp(jnp.where(kept, -jnp.inf, log_p), axis=-1)
    return jnp.maximum(outside, np.log(TINY))
