"""Scoring: the definition, position by position, without the logits of all of them."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_qat.data.packing import Rows, pack, targets
from gemma_qat.errors import InputError
from gemma_qat.evals import reference as reference_module
from gemma_qat.evals.reference import reference_of
from gemma_qat.evals.score import _scores, positions_at_once, score
from gemma_qat.models import SIZES, Gemma4, initialize
from gemma_qat.nn.module import split

CONFIG = dataclasses.replace(
    SIZES["tiny_12b"], name="small", vocab_size=283, width=32, head_width=16, global_head_width=32,
    ffn_width=32, window=8, layer_kinds=("sliding", "sliding", "full"),
)  # fmt: skip
BYTES = np.arange(283) % 5


@pytest.fixture(scope="module")
def rows() -> Rows:
    generator = np.random.default_rng(0)
    documents = [generator.integers(3, 283, size=size).tolist() for size in (29, 7, 12, 40)]
    learn = [[1] * 29, [1] * 7, [0] * 12, [0, 1] * 20]
    return pack(documents, 12, mix=False, learn=learn)


@pytest.fixture(scope="module")
def models() -> tuple[Gemma4, Gemma4]:
    """A reference and a student; matrices large enough that they are sure of something, and differ."""
    made = []
    for seed in (0, 1):
        parameters = initialize(CONFIG, seed)
        table = parameters["embed/table"]
        made.append(Gemma4.from_parameters(CONFIG, parameters | {"embed/table": table * 8.0}))
    return made[0], made[1]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def test_scores_are_their_definition(rows: Rows, models: tuple[Gemma4, Gemma4]) -> None:
    """If it fails, the figures of every report are of other tokens, or not what they are called."""
    reference, student = models
    wanted, weights = targets(rows)
    scored = weights > 0
    given = [jnp.asarray(array) for array in (rows.tokens, rows.positions, rows.segments)]
    log_p, log_q = (
        log_softmax(np.asarray(model(*given)))[scored] for model in (reference, student)
    )
    own, found = score({"s": student}, reference, rows, BYTES, batch_size=3, chunk=4)
    records, target = found["s"], wanted[scored]
    at = np.arange(len(target))
    # float32 sums of 283 terms whose logs are at most some 30: 283 x 30 x 2^-24 = 5e-4 at the worst, 1e-5 as they fall.
    near = {"rtol": 0, "atol": 5e-5}
    np.testing.assert_allclose(records.nll, -log_q[at, target], **near)
    np.testing.assert_allclose(records.reference_nll, -log_p[at, target], **near)
    np.testing.assert_allclose(records.kl, (np.exp(log_p) * (log_p - log_q)).sum(-1), **near)
    np.testing.assert_array_equal(records.agree, log_p.argmax(-1) == log_q.argmax(-1))
    np.testing.assert_array_equal(records.position, rows.positions[scored] + 1)
    np.testing.assert_array_equal(own.nll, records.reference_nll)
    assert records.documents == 3, "the document that has nothing to learn is not there"
    assert records.document_bytes.sum() == BYTES[target].sum()


def test_no_array_has_the_logits_of_all_positions(
    rows: Rows, models: tuple[Gemma4, Gemma4]
) -> None:
    """If it fails, a batch of E2B's rows of 512 needs 2 GB for every copy of its logits."""
    reference = reference_of(models[0], rows)
    graph, state = split(models[1])
    batch = {
        name: np.asarray(array[:4])
        for name, array in {
            "tokens": rows.tokens, "positions": rows.positions, "segments": rows.segments,
            "targets": targets(rows)[0], "reference": reference.hidden,
        }.items()
    }  # fmt: skip

    def widest(chunk: int) -> int:
        made = jax.make_jaxpr(_scores, static_argnums=(0, 2, 5))(
            graph, state, reference.head, reference.leaves, batch, chunk
        )
        return max(_sizes(made.jaxpr))

    assert widest(3) == 4 * 3 * 283 and widest(12) == 4 * 12 * 283
    assert positions_at_once(16, 512, 262144) == 4
    assert positions_at_once(16, 509, 262144) == 1, "a prime length"


def _sizes(jaxpr: jax.extend.core.Jaxpr) -> list[int]:
    """Elements of every array with the vocabulary as an axis and a batch before it."""
    found = [0]
    for equation in jaxpr.eqns:
        for inner in jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr"),
        ):
            if hasattr(inner, "jaxpr") or hasattr(inner, "eqns"):
                found += _sizes(getattr(inner, "jaxpr", inner))
        for out in equation.outvars:
            shape = getattr(out.aval, "shape", ())
            if len(shape) >= 3 and shape[-1] == 283:
                found.append(int(np.prod(shape)))
    return found


def test_a_kept_reference_is_not_run_again(
    rows: Rows, models: tuple[Gemma4, Gemma4], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it fails, the cache is of no use, or gives other figures, or those of another reference."""
    reference, student = models
    run = reference_module.hidden_states
    calls = []

    def counted(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run(*arguments)

    monkeypatch.setattr(reference_module, "hidden_states", counted)
    keep = {"batch_size": 2, "folder": tmp_path / "kept", "identity": "a"}
    with pytest.raises(KeyboardInterrupt):
        reference_of(reference, rows, **keep)
    kept = reference_of(reference, rows, **keep)
    batches = -(-len(rows) // 2)
    assert len(calls) == batches + 1, "goes on with the rows after the last that were kept"
    again = reference_of(reference, rows, **keep)
    assert len(calls) == batches + 1
    np.testing.assert_array_equal(again.hidden, reference_of(reference, rows, batch_size=2).hidden)
    _, one = score({"s": student}, kept, rows, BYTES)
    _, two = score({"s": student}, again, rows, BYTES)
    np.testing.assert_array_equal(one["s"].kl, two["s"].kl)
    other = reference_of(student, rows, **keep | {"identity": "b"})
    assert not np.array_equal(other.hidden, again.hidden)


def test_processes_make_hidden_states_one_at_a_time(
    rows: Rows, models: tuple[Gemma4, Gemma4], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it fails, two evaluations with one cache write one file, and one measures what is half written."""
    keep = {"batch_size": 2, "folder": tmp_path / "kept", "identity": "a"}
    run, inside, beside, calls = reference_module.hidden_states, Event(), Event(), []

    def counted(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == 1:
            inside.set()
            beside.wait(0.5)  # Long enough for another that is not kept waiting.
        else:
            beside.set()
        return run(*arguments)

    monkeypatch.setattr(reference_module, "hidden_states", counted)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(reference_of, models[0], rows, **keep)
        inside.wait()
        second = pool.submit(reference_of, models[0], rows, **keep)
        np.testing.assert_array_equal(first.result().hidden, second.result().hidden)
    assert len(calls) == -(-len(rows) // 2)
    (kept,) = (tmp_path / "kept").iterdir()
    assert kept.name.startswith("reference-")


def test_what_does_not_belong_together_is_refused(
    rows: Rows, models: tuple[Gemma4, Gemma4]
) -> None:
    """If it fails, a token outside the vocabulary, or states of other rows, become figures."""
    outside = dataclasses.replace(rows, tokens=rows.tokens + 200)
    with pytest.raises(InputError, match=r"reference: vocabulary of 283, but the text has token"):
        reference_of(models[0], outside)
    leaves = initialize(CONFIG, 0)
    broken = Gemma4.from_parameters(CONFIG, {path: leaf * np.nan for path, leaf in leaves.items()})
    with pytest.raises(InputError, match=r"s: what it says of \d+ of \d+ tokens is not finite"):
        score({"s": broken}, models[0], rows, BYTES)
    with pytest.raises(InputError, match="the reference: what it says"):
        score({"s": models[1]}, broken, rows, BYTES)
    with pytest.raises(ValueError, match="other rows"):
        score({"s": models[1]}, reference_of(models[0], rows), rows[:2], BYTES)
