"""Every divergence a run may minimize: scores against float64 by hand, closed gradients against automatic ones."""

from __future__ import annotations

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_qat.config import ExperimentConfig
from gemma_qat.errors import InputError
from gemma_qat.models import ModelConfig, fit, initialize
from gemma_qat.start import check_start, workload_of
from gemma_qat.train import LOSSES, OptimizerConfig, TrainConfig, train, with_scales
from gemma_qat.train.divergences import DIVERGENCES

RNG = np.random.default_rng(3)
WORDS = 11
A, B = (3 * RNG.standard_normal((2, 6, WORDS)).astype(np.float32) for _ in range(2))
TARGETS = RNG.integers(0, WORDS, (2, 6)).astype(np.int32)
NAMES = tuple(DIVERGENCES)
KEPT = (None, 1, 4, WORDS)
SMALL = ModelConfig(
    name="one layer", layer_kinds=("full",), vocab_size=64, width=32, query_heads=2, kv_heads=1, global_kv_heads=1,
    head_width=16, global_head_width=32, ffn_width=32, window=4, max_positions=64,
)  # fmt: skip


def log_softmax(x: np.ndarray) -> np.ndarray:
    return x - np.log(np.sum(np.exp(x.astype(np.float64)), axis=-1, keepdims=True))


def kept_words(k: int) -> tuple[np.ndarray, np.ndarray]:
    log_t = log_softmax(A)
    ids = np.argsort(-log_t, axis=-1)[..., :k]
    return ids.astype(np.int32), np.take_along_axis(log_t, ids, -1).astype(np.float32)


def merging(k: int | None) -> np.ndarray:
    """Which words are one outcome: 0 or 1, [B, T, O, V]."""
    if k is None:
        return np.broadcast_to(np.eye(WORDS), (*A.shape[:2], WORDS, WORDS))
    single = np.eye(WORDS)[kept_words(k)[0]]
    others = 1 - single.sum(-2, keepdims=True)
    return single if k == WORDS else np.concatenate([single, others], axis=-2)


def plain(name: str, k: int | None, logits: Any, x: Any = np) -> Any:
    """The definition, of probabilities of outcomes; `x` is numpy, or jax's to be differentiated."""
    which = merging(k)
    t = np.einsum("btov,btv->bto", which, np.exp(log_softmax(A)))
    e = x.exp(logits)
    p = x.einsum("btov,btv->bto", which, e / e.sum(-1, keepdims=True))
    m = (t + p) / 2
    target = np.take_along_axis(which, TARGETS[:, :, None, None], axis=-1)[..., 0]
    g = (t * target).sum(-1)
    ahead, back = (t * x.log(t / p)).sum(-1), (p * x.log(p / t)).sum(-1)
    return {
        "kl": ahead,
        "reverse_kl": back,
        "js": ((t * x.log(t / m)).sum(-1) + (p * x.log(p / m)).sum(-1)) / 2,
        "cakld": g * back + (1 - g) * ahead,
    }[name]


def ours(name: str, k: int | None, student: Any = B) -> tuple[Any, Any]:
    """Scores and the closed gradient, of logits or of kept words."""
    teacher = jnp.asarray(A) if k is None else tuple(map(jnp.asarray, kept_words(k)))
    return LOSSES[name].score(jnp.asarray(student), jnp.asarray(TARGETS), teacher)


@pytest.mark.parametrize("k", KEPT)
@pytest.mark.parametrize("name", NAMES)
def test_scores_and_gradients_are_those_of_the_definition(name: str, k: int | None) -> None:
    """If it fails, a run descends something else than what it reports, or than its name says."""
    scores, gradient = ours(name, k)
    want = plain(name, k, B.astype(np.float64))
    # Float32 differences of logarithms of about 10, each weighed with a probability: a few 2^-20 in all. With every
    # word kept, what 11 float32 probabilities miss of 1 is a rest, against a student of at least 1e-30.
    bound = 4e-6 + (WORDS * 2.0**-24 * 69 if k == WORDS else 0)
    np.testing.assert_allclose(scores[name], want, rtol=1e-5, atol=bound)
    with jax.enable_x64(True):
        wide = jnp.asarray(B, jnp.float64)
        automatic = jax.grad(lambda z: plain(name, k, z, jnp).sum())(wide)
        assert automatic.dtype == jnp.float64
    np.testing.assert_allclose(gradient, np.asarray(automatic), rtol=2e-5, atol=bound)
    assert float(np.abs(np.asarray(gradient).sum(-1)).max()) < 1e-5  # a shift of all logits is free


@pytest.mark.parametrize("name", NAMES)
def test_merging_outcomes_never_adds(name: str) -> None:
    """Data processing: fewer kept words never give more; of cakld where the target is kept, which fixes its weight."""
    whole = np.asarray(ours(name, None)[0][name])
    for k in (1, 2, 5, 8):
        merged = np.asarray(ours(name, k)[0][name])
        holds = (kept_words(k)[0] == TARGETS[..., None]).any(-1) if name == "cakld" else True
        assert (np.where(holds, merged - whole, 0) <= 1e-5).all(), k
    assert (np.asarray(ours(name, 2)[0][name]) < whole - 1e-3).any()


@pytest.mark.parametrize("k", KEPT)
@pytest.mark.parametrize("name", NAMES)
def test_agreement_costs_nothing_and_pulls_nowhere(name: str, k: int | None) -> None:
    scores, gradient = ours(name, k, A)
    # As above: what kept words miss of 1.
    bound = 1e-6 + (WORDS * 2.0**-24 * 69 if k == WORDS else 0)
    assert float(np.abs(scores[name]).max()) <= bound
    assert float(np.abs(gradient).max()) <= 2e-6
    apart = np.asarray(ours(name, k)[0][name])
    assert (apart > 1e-3).all() if k != 1 else (apart >= -1e-6).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("k", [None, 2])
def test_words_that_one_side_excludes_stay_finite(name: str, k: int | None) -> None:
    """Logits of 10,000 give probabilities of exactly 0; if it fails, one such word ends a run in NaN."""
    far = 1e4 * np.eye(WORDS, dtype=np.float32)[[[0, 1, 2]]]
    away = 1e4 * np.eye(WORDS, dtype=np.float32)[[[0, 5, 6]]] - far / 2
    targets = np.array([[0, 1, 7]], np.int32)
    teacher: Any = jnp.asarray(far)
    if k is not None:
        values, ids = jax.lax.top_k(jax.nn.log_softmax(teacher), k)
        teacher = (ids.astype(jnp.int32), values)
    scores, gradient = LOSSES[name].score(jnp.asarray(away), jnp.asarray(targets), teacher)
    for score in (*scores.values(), gradient):
        assert np.isfinite(score).all()
    assert (np.asarray(scores[name]) >= -1e-27).all()  # the rest of kept words is held above 1e-30
    # What they agree on costs nothing, what they do not costs as much as it can.
    found = np.asarray(scores[name])[0]
    assert found[0] == pytest.approx(0, abs=1e-6)
    assert found[1] == pytest.approx(np.log(2), rel=1e-5) if name == "js" else found[1] > 10


def test_the_teachers_confidence_is_not_differentiated_and_picks_the_direction() -> None:
    """Sure of the target: the reverse divergence; giving it nothing: the forward one. BitDistiller's directions."""
    sure = np.zeros((1, 2, WORDS), np.float32)
    sure[0, :, 4] = 40
    targets = jnp.asarray([[4, 5]])
    student = jnp.asarray(B[:1, :2])
    scores = {n: LOSSES[n].score(student, targets, jnp.asarray(sure))[0][n][0] for n in NAMES}
    assert float(scores["cakld"][0]) == pytest.approx(float(scores["reverse_kl"][0]), rel=1e-6)
    assert float(scores["cakld"][1]) == pytest.approx(float(scores["kl"][1]), rel=1e-6)
    assert abs(float(scores["kl"][0] - scores["reverse_kl"][0])) > 1


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "cakld" else pytest.mark.slow) for n in NAMES]
)
def test_training_on_it_brings_it_down(name: str, batches: Any, one_batch: Any) -> None:
    """If it fails, `train.loss` names a divergence that a run reports and does not minimize."""
    floats = initialize(SMALL, 0)
    fitted = fit(SMALL, "w2", "learned")
    how = TrainConfig(steps=12, batch_size=2, loss=name, log_every=1, watch_codes=False)
    optimizer = OptimizerConfig(learning_rate=1e-2, warmup=0, decay="constant")
    begun = with_scales(floats, fitted, "mse")
    found = train(
        fitted, begun, one_batch(next(batches())), how, optimizer, teacher=(SMALL, floats)
    )
    curve = [value for _, value in found.curves[name]]
    assert curve[-1] < 0.7 * curve[0], curve
    np.testing.assert_array_equal(curve, [value for _, value in found.curves["loss"]])


def test_what_asks_for_a_teacher() -> None:
    """If it fails, a run has no teacher to learn from, or a plan leaves one out that a run will hold."""
    asked = {name: TrainConfig(loss=name).asks_for_teacher for name in LOSSES}
    assert asked == {"ce": ""} | {name: f"train.loss={name}" for name in NAMES}
    assert TrainConfig(loss="ce", hidden_weight=0.5).asks_for_teacher == "train.hidden_weight=0.5"
    assert [TrainConfig(loss=name).needs_teacher for name in ("ce", "js")] == [False, True]
    for name in LOSSES:
        config = ExperimentConfig(name="a", model="tiny_e2b", train=TrainConfig(loss=name))
        assert (workload_of(config).teacher is None) == (name == "ce")
        with pytest.raises(InputError) if name != "ce" else contextlib.nullcontext() as refused:
            check_start(config)
        assert refused is None or f"train.loss={name} needs a float" in str(refused.value)
    hidden = ExperimentConfig(name="a", model="tiny_e2b", train=TrainConfig(hidden_weight=0.5))
    assert workload_of(hidden).teacher is not None
