"""Continuations scored in padded batches against one whole forward a request; prompts completed up to their stops."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_qat.errors import InputError
from gemma_qat.evals import continuations
from gemma_qat.evals.continuations import complete, cut_left, score_continuations, windows
from gemma_qat.models import SIZES, Gemma4, declare
from gemma_qat.models.sizes import pattern

VOCAB, BOS = 61, 2
RNG = np.random.default_rng(3)


@pytest.fixture(scope="module")
def model() -> Gemma4:
    config = dataclasses.replace(
        SIZES["tiny_12b"], vocab_size=VOCAB, window=5, layer_kinds=pattern(2, 2), max_positions=80,
        ties_head=False,  # a random model with a tied head says one token again and again
    )  # fmt: skip
    rng = np.random.default_rng(0)
    leaves = {
        path: jnp.asarray(
            p.init_scale * (np.ones if p.init == "constant" else rng.standard_normal)(p.shape),
            jnp.float32,
        )
        for path, p in declare(config).items()
    }
    return Gemma4.from_parameters(config, leaves)


def naive(model: Gemma4, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
    """From all logits of the request alone, in numpy; zeros behind it keep to one compiled shape."""
    whole = [*context, *continuation][:-1]
    tokens = jnp.asarray([whole + [0] * (80 - len(whole))])
    logits = np.asarray(model(tokens), np.float64)[0, len(context) - 1 : len(whole)]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    picked = log_p[np.arange(len(continuation)), continuation]
    return float(picked.sum()), bool((logits.argmax(-1) == continuation).all())


def ids(count: int) -> list[int]:
    return RNG.integers(3, VOCAB, count).tolist()


def greedy(model: Gemma4, prompts: list[list[int]], count: int) -> list[list[int]]:
    """By whole forwards."""
    written = [list(prompt) for prompt in prompts]
    for _ in range(count):
        tokens = jnp.asarray([row + [0] * (80 - len(row)) for row in written])
        best = np.asarray(model(tokens)).argmax(-1)
        written = [[*row, int(best[i, len(row) - 1])] for i, row in enumerate(written)]
    return [row[-count:] for row in written]


def test_scores_are_those_of_whole_forwards(model: Gemma4, monkeypatch) -> None:
    """If it fails, padding, batching or scoring by parts changes what a benchmark measures."""
    # A chunk of 2 positions, so that every batch goes through the head in several parts.
    monkeypatch.setattr("gemma_qat.evals.score.LOGITS_AT_ONCE", 3 * VOCAB * 2)
    pairs = [([BOS, *ids(c)], ids(k)) for c, k in ((0, 1), (7, 3), (40, 2), (3, 30), (11, 1))]
    prompts = [[BOS, *ids(n)] for n in (4, 9)]
    pairs += zip(prompts, greedy(model, prompts, 3), strict=True)
    # The same but for one token in the middle is not what greedy decoding writes.
    context, (a, b, c) = pairs[-1]
    pairs.append((context, [a, (b + 1) % VOCAB, c]))
    found = score_continuations(model, pairs, batch_size=3)
    wanted = [naive(model, *pair) for pair in pairs]
    # Sums of up to 30 float32 log probabilities of about 4 nats, each off by some 2^-24 of that and of the logits.
    np.testing.assert_allclose([f[0] for f in found], [w[0] for w in wanted], atol=30 * 2e-6)
    assert [f.is_greedy for f in found] == [w[1] for w in wanted]
    assert [f.is_greedy for f in found[-3:]] == [True, True, False]


def test_a_benchmark_compiles_few_programs(model: Gemma4) -> None:
    """If it fails, every length of request is compiled anew, minutes each at full size."""
    pairs = [([BOS, *ids(c)], ids(k)) for c in range(33, 60, 3) for k in (1, 2, 5)]
    continuations._hidden.clear_cache()
    continuations._scores.clear_cache()
    score_continuations(model, pairs, batch_size=4)
    assert continuations._hidden._cache_size() == 1  # 33 to 64 input tokens
    assert continuations._scores._cache_size() == 1


@pytest.mark.parametrize("count", [1, 4, 5, 8, 9, 12])
def test_windows_predict_every_token_once_after_bos(count: int) -> None:
    """If it fails, rolling perplexity skips or repeats tokens, or runs Gemma without its first token."""
    text = list(range(10, 10 + count))
    pairs = list(windows(text, BOS, 5))
    assert [token for _, continuation in pairs for token in continuation] == text
    for context, continuation in pairs:
        assert context[0] == BOS and len(context) + len(continuation) - 1 <= 5
        seen = [*context[1:], *continuation]
        assert seen == text[text.index(seen[0]) :][: len(seen)]  # in the order of the text
    assert all(len(c) + len(k) - 1 == 5 for c, k in pairs[1:])  # all the context that fits


def test_a_context_is_cut_behind_bos() -> None:
    """If it fails, a long prompt loses `<bos>` or its end, where the question stands."""
    assert cut_left([BOS, 5, 6, 7, 8], 3) == [BOS, 7, 8]
    assert cut_left([BOS, 5, 6], 3) == [BOS, 5, 6]


def letters(tokens: Sequence[int]) -> str:
    return "".join(chr(65 + token) for token in tokens)


def test_completions_end_where_they_are_told(model: Gemma4) -> None:
    """If it fails, answers carry what comes after them, or depend on the requests beside them."""
    prompts = [[BOS, *ids(n)] for n in (3, 17, 9, 1, 6)]
    whole = greedy(model, prompts, 6)
    how = {"decode": letters, "max_new_tokens": 6, "batch_size": 2}
    assert complete(model, prompts, **how) == [letters(tokens) for tokens in whole]
    end = whole[0][2]
    cut = [letters(t[: t.index(end)]) if end in t else letters(t) for t in whole]
    assert complete(model, prompts, stop_tokens=[end], **how) == cut
    texts = [letters(tokens) for tokens in whole]
    pairs = [(text[i : i + 2], i) for text in texts for i in range(1, 5)]
    stop = next(pair for pair, i in pairs if any(text.find(pair) == i for text in texts))
    cut = [text.split(stop)[0] for text in texts]
    assert any(0 < len(text) < 6 for text in cut)
    assert complete(model, prompts, stop_strings=["", stop], **how) == cut


def test_a_batch_ends_with_its_last_open_row(model: Gemma4, monkeypatch) -> None:
    """If it fails, a row that said its answer is decoded on to the limit."""
    steps = []
    real = continuations.stream

    def counted(*arguments, **keywords):
        for step in real(*arguments, **keywords):
            steps.append(step)
            yield step

    monkeypatch.setattr(continuations, "stream", counted)
    prompt = [BOS, *ids(5)]
    first = letters(greedy(model, [prompt], 1)[0])
    found = complete(
        model, [prompt], decode=letters, max_new_tokens=20, stop_strings=[first], batch_size=3
    )
    assert found == [""] and len(steps) == 1


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        (([], [1]), "at least one token each"),
        (([1], []), "at least one token each"),
        (([1], [VOCAB]), f"token {VOCAB} is outside the vocabulary of {VOCAB}"),
        (([1] * 60, [1] * 22), "81 tokens of context and continuation, the model has 80"),
    ],
)
def test_what_cannot_be_scored_is_said(model: Gemma4, pair, words: str) -> None:
    """If it fails, a clamped index gives a score that looks like one."""
    with pytest.raises(InputError, match=words):
        score_continuations(model, [pair])


def test_batches_are_split_over_a_mesh(model: Gemma4, tmp_path) -> None:
    """One device, yet the path of a placed model: if it fails, a sharded model cannot be measured."""
    from gemma_qat.sharding import MeshConfig, Placement, make_mesh

    placement = Placement(make_mesh(MeshConfig(), jax.devices()[:1]), "fsdp")
    placed = Gemma4(model.config, model.leaves(), dict(model.plans), model.options, placement)
    pair = ([BOS, *ids(5)], ids(2))
    (found,) = score_continuations(placed, [pair], batch_size=2)
    assert found.log_probability == pytest.approx(naive(model, *pair)[0], abs=1e-5)
