"""What is minimized, against float64 by hand, and in chunks as in one piece."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_qat.quant import scale_path
from gemma_qat.train import OptimizerConfig, chunked, cross_entropy, divergence, make_optimizer
from gemma_qat.train.losses import LOSSES, divergence_topk

RNG = np.random.default_rng(0)
A, B = (jnp.asarray(3 * RNG.standard_normal((2, 6, 11)), jnp.float32) for _ in range(2))
TARGETS = jnp.asarray(RNG.integers(0, 11, (2, 6)), jnp.int32)


def log_softmax(x: jax.Array) -> np.ndarray:
    wide = np.asarray(x, np.float64)
    return wide - np.log(np.sum(np.exp(wide), axis=-1, keepdims=True))


def test_by_hand() -> None:
    nll = -np.take_along_axis(log_softmax(A), np.asarray(TARGETS)[..., None], -1)[..., 0]
    np.testing.assert_allclose(cross_entropy(A, TARGETS), nll, rtol=1e-5, atol=1e-6)
    kl = np.sum(np.exp(log_softmax(A)) * (log_softmax(A) - log_softmax(B)), axis=-1)
    np.testing.assert_allclose(divergence(A, B), kl, rtol=1e-4, atol=1e-6)
    assert (np.abs(divergence(A, A)) < 1e-6).all()


@pytest.mark.parametrize("chunk", [1, 2, 3, 6])
def test_chunks_change_nothing(chunk: int) -> None:
    def total(a: jax.Array, size: int) -> jax.Array:
        scores = chunked(lambda x, t: {"nll": cross_entropy(x, t)}, [a, TARGETS], size)
        return jnp.sum(scores["nll"] * jnp.arange(12).reshape(2, 6))

    whole, gradient = jax.value_and_grad(total)(A, 0)
    parts, in_parts = jax.value_and_grad(total)(A, chunk)
    np.testing.assert_allclose(parts, whole, rtol=1e-6)
    np.testing.assert_allclose(in_parts, gradient, rtol=1e-5, atol=1e-6)


def test_a_chunk_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="loss chunk of 4 positions does not divide rows of 6"):
        chunked(lambda x, t: {"nll": cross_entropy(x, t)}, [A, TARGETS], 4)


def test_scales_take_relative_steps_and_keep_their_sign() -> None:
    leaves = {
        "groups/0/0/ffn/up/kernel": jnp.ones((1, 4, 4)), "groups/0/0/router/per_expert_scale": jnp.ones((1, 4)),
        scale_path("groups/0/0/ffn/up/kernel"): jnp.asarray([[[-1e-3, 1.0, 100.0]]]),
    }  # fmt: skip
    config = OptimizerConfig(
        learning_rate=0.5, scale_learning_rate=0.01, warmup=0, clip=1e9, decay="constant"
    )
    optimizer = make_optimizer(config, 10, leaves)
    updates, _ = optimizer.update(
        jax.tree.map(jnp.ones_like, leaves), optimizer.init(leaves), leaves
    )
    np.testing.assert_allclose(
        updates["groups/0/0/ffn/up/kernel_scale"][0, 0], [-1e-5, -0.01, -1.0], rtol=1e-3
    )
    for path in ("groups/0/0/ffn/up/kernel", "groups/0/0/router/per_expert_scale"):
        np.testing.assert_allclose(updates[path], -0.5, rtol=1e-3)


def topk(k: int) -> tuple[jax.Array, jax.Array]:
    log_t, ids = jax.lax.top_k(jax.nn.log_softmax(A), k)
    return ids, log_t


@pytest.mark.parametrize("k", [1, 4, 11])
def test_a_cached_teacher_keeps_the_rest_as_one_outcome(k: int) -> None:
    """By hand in float64; with every word kept it is the whole divergence, and fewer words never give more."""
    log_t, log_s = log_softmax(A), log_softmax(B)
    order = np.argsort(-log_t, axis=-1)[..., :k]
    t, s = (np.exp(np.take_along_axis(x, order, -1)) for x in (log_t, log_s))
    want = np.sum(t * np.log(t / s), axis=-1)
    if k < 11:
        t_rest, s_rest = 1 - t.sum(-1), 1 - s.sum(-1)
        want = want + t_rest * np.log(t_rest / s_rest)
    ours = divergence_topk(topk(k), B)
    # What 11 float32 probabilities miss of 1 counts as rest, against a student of at least 1e-30: 11 x 2^-24 x 69 nats.
    bound = 11 * 2.0**-24 * 69
    np.testing.assert_allclose(ours, want, rtol=1e-5, atol=bound)
    assert (np.asarray(ours) <= np.asarray(divergence(A, B)) + bound).all()


@pytest.mark.parametrize(
    ("loss", "teacher", "naive"),
    [
        pytest.param("ce", None, lambda s: cross_entropy(s, TARGETS), id="ce"),
        pytest.param("kl", A, lambda s: divergence(A, s), id="kl"),
        pytest.param("kl", topk(3), lambda s: divergence_topk(topk(3), s), id="kl-topk"),
        pytest.param("kl", topk(11), lambda s: divergence(A, s), id="kl-all"),
    ],
)
def test_closed_gradients_equal_automatic_ones(loss: str, teacher: Any, naive: Any) -> None:
    scores, gradient = LOSSES[loss].score(B, TARGETS, teacher)
    value, pull = jax.vjp(naive, B)
    np.testing.assert_allclose(scores[LOSSES[loss].averaged], value, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(gradient, pull(jnp.ones_like(value))[0], rtol=1e-4, atol=1e-5)
