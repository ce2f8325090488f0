"""Generation through the cache: if these fail, decoding is not the model's own forward pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_qat import kernels
from gemma_qat.decode import Sampling, generate, stream
from gemma_qat.decode.generate import _step
from gemma_qat.decode.sampling import sample
from gemma_qat.errors import InputError
from gemma_qat.models import SIZES, Gemma4, declare
from gemma_qat.models.sizes import pattern
from gemma_qat.nn.module import merge, split

pytestmark = pytest.mark.usefixtures("quick_to_compile")

RNG = np.random.default_rng(5)


def _model(name: str) -> Gemma4:
    config = SIZES[name]
    small: dict[str, Any] = {
        "vocab_size": 64,
        "window": 5,
        "layer_kinds": pattern(4, 2),
        "max_positions": 40,
    }
    if config.per_layer_width:
        small |= {"per_layer_vocab": 64, "shared_kv_layers": 2}
    config = dataclasses.replace(config, **small)
    rng = np.random.default_rng(0)
    leaves = {
        path: p.init_scale * np.ones(p.shape)
        if p.init == "constant"
        else p.init_scale * rng.standard_normal(p.shape)
        for path, p in declare(config).items()
    }
    return Gemma4.from_parameters(
        config, {path: jnp.asarray(x, jnp.float32) for path, x in leaves.items()}
    )


@pytest.fixture(scope="module")
def model() -> Gemma4:
    return _model("tiny_12b")


@pytest.fixture(scope="module", params=["tiny_e2b", "tiny_26b_a4b", "tiny_12b"])
def any_model(request: Any) -> Gemma4:
    return _model(request.param)


@pytest.fixture(scope="module")
def hidden(model: Gemma4) -> Callable[..., Any]:
    """`model.hidden`, compiled once for every number of tokens."""
    graph, state = split(model)
    compiled = jax.jit(lambda state, *arrays: merge(graph, state).hidden(*arrays))
    return lambda *arrays: compiled(state, *arrays)


PROMPTS = [RNG.integers(1, 64, 13).tolist(), RNG.integers(1, 64, 4).tolist(), [7]]
NEW = 8
"""How many tokens most tests make: as many as others, so that caches are as long and little is compiled again."""


def test_greedy_equals_the_argmax_of_full_forwards(any_model: Gemma4) -> None:
    """Prompts longer and shorter than the window of 5, answers that wrap the ring: each token from scratch again."""
    got = generate(any_model, PROMPTS, max_new_tokens=NEW)
    width = max(map(len, PROMPTS)) + NEW
    for prompt, answer in zip(PROMPTS, got, strict=True):
        row = np.zeros((1, width), np.int32)
        row[0, : len(prompt) + NEW] = [*prompt, *answer]
        logits = np.asarray(any_model(jnp.asarray(row)))[0]
        ends = np.arange(len(prompt) - 1, len(prompt) + NEW - 1)
        best = np.sort(logits[ends], axis=-1)
        assert (best[:, -1] - best[:, -2] > 1e-4).all(), "a tie: choose another seed"
        np.testing.assert_array_equal(logits[ends].argmax(-1), answer)


@pytest.mark.parametrize(
    "any_model",
    ["tiny_26b_a4b", *(pytest.param(n, marks=pytest.mark.slow) for n in ("tiny_e2b", "tiny_12b"))],
    indirect=True,
)
def test_a_row_does_not_depend_on_its_neighbours(any_model: Gemma4) -> None:
    together = generate(any_model, PROMPTS, max_new_tokens=6)
    for prompt, answer in zip(PROMPTS, together, strict=True):
        np.testing.assert_array_equal(generate(any_model, [prompt], max_new_tokens=6)[0], answer)


@pytest.mark.parametrize("chunks", [[13], [7, 6], [2, 6, 1, 4], [1] * 13])
def test_a_prompt_in_chunks_gives_the_same_hidden_states(
    model: Gemma4, hidden: Callable[..., Any], chunks: list[int]
) -> None:
    """Several tokens written at once over slots that the first of them still sees."""
    tokens = jnp.asarray([PROMPTS[0]])
    want, _ = hidden(tokens)
    caches, out, start = model.empty_caches(1, 13), [], 0
    for length in chunks:
        positions = jnp.arange(start, start + length)[None]
        part = tokens[:, start : start + length]
        found, caches = hidden(part, positions, jnp.ones_like(part), caches)
        out.append(found)
        start += length
    np.testing.assert_allclose(jnp.concatenate(out, axis=1), want, atol=1e-4)


@pytest.mark.parametrize("cache", ["float", "int8"])
def test_a_loop_over_layers_gives_the_same_tokens(cache: str) -> None:
    """If it fails, an unrolled decoder writes a layer's tokens to another layer's cache."""
    model = _model("tiny_12b")
    loop = Gemma4(model.config, model.leaves(), {}, dataclasses.replace(model.options, scan=False))
    found = [
        generate(one, PROMPTS, max_new_tokens=4, cache=cache, chunk=5) for one in (model, loop)
    ]
    np.testing.assert_array_equal(*found)


def test_caches_have_the_size_they_need() -> None:
    """The window on sliding layers, the length on global ones, nothing on KV-sharing ones."""
    model = _model("tiny_e2b")
    slots = [
        None if kv is None else kv.positions.shape[2]
        for group in model.empty_caches(2, 20)
        for kv in group
    ]
    assert slots == [5, 20, None, None]


def test_caches_of_codes_have_whole_tiles_of_slots() -> None:
    """Multiples of 32 but for a window; else a TPU copies a cache at every token."""
    model = _model("tiny_e2b")
    caches = model.empty_caches(1, 33, "int4")
    slots = [None if kv is None else kv.positions.shape[2] for group in caches for kv in group]
    assert slots == [5, 64, None, None]


def test_stop_tokens_end_a_row_and_only_it(model: Gemma4) -> None:
    free = generate(model, PROMPTS, max_new_tokens=NEW)
    stop = int(free[0, 2])
    got = generate(model, PROMPTS, max_new_tokens=NEW, stop_tokens=[stop, 9999])
    assert got.shape == free.shape and got.dtype == np.int32
    for row, answer in zip(free, got, strict=True):
        hits = np.flatnonzero(row == stop)
        end = hits[0] + 1 if hits.size else NEW
        np.testing.assert_array_equal(answer[:end], row[:end])
        assert (answer[end:] == 0).all()


def test_sampling_repeats_with_its_seed(model: Gemma4) -> None:
    def draw(seed: int) -> np.ndarray:
        return generate(model, PROMPTS, max_new_tokens=NEW, temperature=3.0, seed=seed)

    np.testing.assert_array_equal(draw(1), draw(1))
    assert (draw(1) != draw(2)).any()
    cold = generate(model, PROMPTS, max_new_tokens=NEW, temperature=1e-6)
    np.testing.assert_array_equal(cold, generate(model, PROMPTS, max_new_tokens=NEW))


def test_sampled_frequencies_are_the_softmax() -> None:
    """20000 draws at temperature 2; each frequency within five standard deviations."""
    logits = jnp.asarray([0.0, 1.0, 2.0, -3.0])
    drawn = sample(
        jnp.broadcast_to(logits, (20_000, 4)), Sampling(temperature=2.0), jax.random.key(0)
    )
    p = np.exp(np.asarray(logits) / 2)
    p /= p.sum()
    frequency = np.bincount(drawn, minlength=4) / 20_000
    assert (np.abs(frequency - p) < 5 * np.sqrt(p * (1 - p) / 20_000)).all()


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "at least one prompt"),
        ([[1, 2], []], "prompt 1: a non-empty list of integer tokens"),
        ([[[1, 2]]], "prompt 0: a non-empty list"),
        ([3], "prompt 0: a non-empty list"),
        ([[1, 64]], "prompt 0: token 64 is outside the vocabulary of 64"),
        ([[1], [2, -1, 5]], "prompt 1: token -1 is outside"),
        ([np.asarray([2**32 + 1])], "token 4294967297 is outside"),
        ([[2**70]], "prompt 0:"),
        ([[0.5, 1.0]], "prompt 0:"),
        (["hello"], "prompt 0:"),
        ([[1] * 39], "39 prompt tokens and 2 new ones exceed the model's 40 positions"),
    ],
    ids=str,
)
def test_bad_prompts_are_one_line(model: Gemma4, prompts: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        generate(model, prompts, max_new_tokens=2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 0},
        {"max_new_tokens": -1},
        {"max_new_tokens": 1, "temperature": -1.0},
        {"max_new_tokens": 1, "temperature": float("nan")},
        {"max_new_tokens": 1, "top_k": -1},
        {"max_new_tokens": 1, "top_p": 0.0},
        {"max_new_tokens": 1, "top_p": 1.5},
        {"max_new_tokens": 1, "chunk": -2},
    ],
)
def test_bad_options_are_one_line(model: Gemma4, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="given"):
        generate(model, [[1]], **options)
    with pytest.raises(InputError, match="unknown cache 'int5'.*nearest: int"):
        generate(model, [[1]], max_new_tokens=1, cache="int5")


@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_prompts_in_chunks_give_the_same_tokens(model: Gemma4, chunk: int) -> None:
    """If it fails, a long prompt has to fit at once, or is read differently when it does not."""
    want = generate(model, PROMPTS, max_new_tokens=NEW)
    np.testing.assert_array_equal(generate(model, PROMPTS, max_new_tokens=NEW, chunk=chunk), want)


def test_tokens_come_one_by_one(model: Gemma4) -> None:
    """If it fails, a person waits for the last token to see the first, or ended rows go on."""
    whole = generate(model, PROMPTS, max_new_tokens=NEW)
    steps = stream(model, PROMPTS, max_new_tokens=NEW)
    np.testing.assert_array_equal(next(steps), whole[:, 0])
    np.testing.assert_array_equal(np.stack([*steps], axis=1), whole[:, 1:])
    stops = np.unique(whole[:, 1]).tolist()
    short = [*stream(model, PROMPTS, max_new_tokens=NEW, stop_tokens=stops)]
    assert len(short) <= 2


SMALL_CACHES = {("tiny_e2b", "int8"), ("tiny_26b_a4b", "int4"), ("tiny_12b", "bfloat16")}
"""Every family and every type once; all of both are a slow test."""


@pytest.mark.parametrize(
    ("any_model", "cache"),
    [
        pytest.param(name, cache, marks=() if (name, cache) in SMALL_CACHES else pytest.mark.slow)
        for name in ("tiny_e2b", "tiny_26b_a4b", "tiny_12b")
        for cache in ("bfloat16", "int8", "int4")
    ],
    indirect=["any_model"],
)
def test_small_caches(any_model: Gemma4, cache: str) -> None:
    """If it fails, a cache of codes is misread: with int8 the likeliest token stays, int4 is close in logits."""
    assert generate(any_model, PROMPTS, max_new_tokens=3, cache=cache).shape == (3, 3)
    tokens = jnp.asarray([PROMPTS[0]])
    at = jnp.arange(13)[None]
    found = {}
    for kind in ("float32", cache):
        caches = any_model.empty_caches(1, 14, kind)
        _, caches = any_model.hidden(tokens, at, jnp.ones_like(tokens), caches, empty_cache=True)
        one = jnp.asarray([[7]])
        hidden, _ = any_model.hidden(one, jnp.asarray([[13]]), jnp.ones_like(one), caches)
        found[kind] = np.asarray(any_model.logits(hidden))
    off = np.abs(found[cache] - found["float32"]).max() / np.abs(found["float32"]).max()
    assert 0 < off < {"bfloat16": 0.02, "int8": 0.03, "int4": 0.5}[cache]


@pytest.mark.parametrize(
    ("name", "cache"),
    [
        ("tiny_e2b", "int8"),
        pytest.param("tiny_26b_a4b", "int4", marks=pytest.mark.slow),
        pytest.param("tiny_31b", "int8", marks=pytest.mark.slow),
    ],
)
def test_kernels_give_the_tokens_of_the_definition(name: str, cache: str) -> None:
    """Rings that wrap, shared keys and values, rows of different lengths, by every backend's attention (interpreted).

    If it fails, decoding on another platform is another model, or a token has come to be a tie: choose another seed.
    """
    model, found = _model(name), {}
    for backend in ("reference", "blocked", "tpu", "gpu"):
        _step.clear_cache()  # jax does not know that another backend is asked for
        with kernels.using(backend):
            found[backend] = generate(model, PROMPTS, max_new_tokens=NEW, cache=cache)
    _step.clear_cache()
    for backend, tokens in found.items():
        np.testing.assert_array_equal(tokens, found["reference"], backend)


def test_sampling_is_cut_to_the_likeliest(model: Gemma4) -> None:
    """If it fails, an unlikely token is drawn where only likely ones may be, or a likely one never is."""
    logits = jnp.log(jnp.asarray([0.05, 0.4, 0.3, 0.2, 0.05]))
    many = jnp.broadcast_to(logits, (4000, 5))

    def seen(**cut: Any) -> set[int]:
        return set(
            np.asarray(sample(many, Sampling(temperature=1.0, **cut), jax.random.key(1))).tolist()
        )

    assert seen(top_k=2) == {1, 2}
    assert seen(top_p=0.4) == {1} and seen(top_p=0.41) == {1, 2} and seen(top_p=0.71) == {1, 2, 3}
    assert seen(top_k=3, top_p=0.45) == {1, 2}  # 0.4 / 0.9 is short of 0.45
    assert seen() == {0, 1, 2, 3, 4}
    options = {"max_new_tokens": NEW, "temperature": 2.0, "seed": 3}
    cold = generate(model, PROMPTS, **{**options, "top_k": 1})
    np.testing.assert_array_equal(cold, generate(model, PROMPTS, max_new_tokens=NEW))
    drawn = generate(model, PROMPTS, **options, top_k=5, top_p=0.9)
    np.testing.assert_array_equal(drawn, generate(model, PROMPTS, **options, top_k=5, top_p=0.9))


@pytest.mark.parametrize("seed", [-1, 2**32, 2**70])
def test_a_seed_of_its_own(seed: int) -> None:
    """If it fails, two seeds draw the same, or a large one ends in a traceback."""
    with pytest.raises(InputError, match="seed"):
        Sampling(temperature=1.0, seed=seed)
