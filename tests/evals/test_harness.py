"""lm-eval on our models: tasks of three kinds, kept in `tasks/`, offline; what it asks against one whole forward each.

pip install 'gemma_qat[eval]'
bash launch/test.sh -n 0 -m judges tests/evals/test_harness.py
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_qat import api
from gemma_qat.data import SYMBOLS, Tokenizer, train_tokenizer
from gemma_qat.errors import InputError
from gemma_qat.models import SIZES, Gemma4, RunOptions, declare, leaf_shardings
from gemma_qat.models.sizes import pattern
from gemma_qat.sharding import MeshConfig, Placement, make_mesh

pytestmark = [
    pytest.mark.judges,
    pytest.mark.skipif(
        importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval: extra `eval`"
    ),
    # Of lm-eval and what it imports; none of these lines is ours.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

TASKS = Path(__file__).with_name("tasks")
NAMES = ("capitals_choice", "capitals_text", "capitals_answer")
LONGEST = 64


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    texts = [path.read_text("utf-8") for path in sorted(TASKS.iterdir())]
    return train_tokenizer(texts, 400, tmp_path_factory.mktemp("t") / "tokenizer.model", SYMBOLS)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Gemma4:
    """A random one, wide enough for tiles of 32; its last norm is random too, or it would repeat one token."""
    config = dataclasses.replace(
        SIZES["tiny_12b"], vocab_size=tokenizer.vocab_size, window=5, layer_kinds=pattern(2, 2),
        max_positions=LONGEST,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    leaves = {
        path: p.init_scale * (np.ones if p.init == "constant" else rng.standard_normal)(p.shape)
        for path, p in declare(config).items()
    }
    leaves["final_norm/weight"] = 2 * rng.standard_normal(config.width)
    return Gemma4.from_parameters(
        config, {path: jnp.asarray(x, jnp.float32) for path, x in leaves.items()}
    )


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path) -> None:
    """No hub, and no cache of documents but this test's."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.chdir(TASKS)


def naive(model: Gemma4, ids: list[int], first: int) -> tuple[float, bool]:
    """log p(ids[first:] | ids[:first]) from all logits, and whether each is the likeliest; zeros fill one shape."""
    tokens = jnp.asarray([ids[:-1] + [0] * (LONGEST + 1 - len(ids))])
    logits = np.asarray(model(tokens), np.float64)[0, first - 1 : len(ids) - 1]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    wanted = np.asarray(ids[first:])
    total = float(log_p[np.arange(len(wanted)), wanted].sum())
    return total, bool((logits.argmax(-1) == wanted).all())


def written(model: Gemma4, tokenizer: Tokenizer, ids: list[int], new: int) -> str:
    """Greedily, by whole forwards, up to a line's or sentence's end."""
    prompt = len(ids)
    for _ in range(new):
        tokens = jnp.asarray([ids + [0] * (LONGEST - len(ids))])
        ids = [*ids, int(np.asarray(model(tokens))[0, len(ids) - 1].argmax())]
    ends = {tokenizer.eos_id, tokenizer.id_of("<turn|>")}
    said = ids[prompt:]
    said = said[: next((i for i, token in enumerate(said) if token in ends), len(said))]
    return tokenizer.decode(said).split("\n")[0].split(".")[0]


def documents() -> list[dict[str, Any]]:
    lines = (TASKS / "capitals.json").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def scores_by_hand(model: Gemma4, tokenizer: Tokenizer) -> dict[str, float]:
    """What the three tasks measure, from whole forwards."""
    rows = documents()
    right, right_by_length, exact, totals, sizes = [], [], [], [], []
    for row in rows:
        context = tokenizer.encode(f"The capital of {row['country']} is", bos=True)
        found = []
        for choice in row["choices"]:
            whole = tokenizer.encode(f"The capital of {row['country']} is {choice}", bos=True)
            found.append(naive(model, whole, len(context))[0])
        right.append(np.argmax(found) == row["answer"])
        lengths = [len(choice) for choice in row["choices"]]
        right_by_length.append(np.argmax(np.divide(found, lengths)) == row["answer"])
        exact.append(written(model, tokenizer, context, 6) == row["choices"][row["answer"]])
        totals.append(rolled(model, tokenizer, row["story"]))
        sizes.append((len(row["story"].split()), len(row["story"].encode())))
    words, size = np.sum(sizes, axis=0)
    return {
        "acc": float(np.mean(right)),
        "acc_norm": float(np.mean(right_by_length)),
        "exact_match": float(np.mean(exact)),
        "word_perplexity": float(np.exp(-sum(totals) / words)),
        "bits_per_byte": float(-sum(totals) / size / np.log(2)),
    }


def rolled(model: Gemma4, tokenizer: Tokenizer, text: str) -> float:
    """The first window as it is; the rest, fewer than the next holds, behind all the text that fits."""
    bos, ids = tokenizer.bos_id, tokenizer.encode(text)
    total = naive(model, [bos, *ids[:LONGEST]], 1)[0]
    if len(ids) > LONGEST:
        assert len(ids) < 2 * LONGEST
        rest = len(ids) - LONGEST
        total += naive(model, [bos, *ids[-LONGEST:]], LONGEST + 1 - rest)[0]
    return total


def test_tasks_of_three_kinds(model: Gemma4, tokenizer: Tokenizer) -> None:
    """If it fails, the benchmarks we print are not what lm-eval means by them; float and packed alike."""
    from gemma_qat.evals.harness import run_tasks

    packed = api.quantize(model, "w4a16")
    stories = [len(tokenizer.encode(row["story"])) for row in documents()]
    assert min(stories) < LONGEST < max(stories)  # some in one window, some in two
    models = {"float": model, "packed": packed}
    found = run_tasks(models, tokenizer, NAMES, task_folder=TASKS, batch_size=4)
    for name, one in models.items():
        by_hand = scores_by_hand(one, tokenizer)
        measured = {
            metric: value
            for task in NAMES
            for metric, value in found["models"][name][task]["metrics"].items()
        }
        assert measured.keys() == by_hand.keys()
        for metric, wanted in by_hand.items():
            assert measured[metric]["value"] == pytest.approx(wanted, rel=2e-6), (name, metric)
        assert measured["acc"]["higher_is_better"] is True
        # The error of a mean over five documents, with the sample's deviation.
        acc = by_hand["acc"]
        assert measured["acc"]["stderr"] == pytest.approx((acc * (1 - acc) / 4) ** 0.5)
        assert measured["word_perplexity"]["stderr"] is None  # lm-eval has none for a ratio
    assert [found["models"]["float"][task]["documents"] for task in NAMES] == [5, 5, 5]
    assert found["tasks"]["capitals_choice"] == {"shots": 0, "version": 1.0}


def request(*arguments: Any) -> Any:
    return types.SimpleNamespace(args=arguments)


def adapter(model: Gemma4, tokenizer: Tokenizer, **how: Any) -> Any:
    from gemma_qat.evals.harness import GemmaLM

    return GemmaLM(model, tokenizer, **how)


def test_single_requests(model: Gemma4, tokenizer: Tokenizer, caplog) -> None:
    """If it fails: an empty context, one that brings its own `<bos>`, or one that is too long is scored as another."""
    bos, long = tokenizer.bos_id, "The old town and the river. " * 12
    asked = [("", "Lima is large."), ("The capital is", " Lima"), ("<bos>The capital is", " Lima")]
    given = [request(context.replace("<bos>", "<s>"), answer) for context, answer in asked]
    with caplog.at_level(logging.WARNING):
        found = adapter(model, tokenizer).loglikelihood([*given, request(long, " Lima")])
    assert "1 contexts did not fit into 64 tokens" in caplog.text
    whole = [
        [bos, *tokenizer.encode("Lima is large.")],
        tokenizer.encode("The capital is Lima", bos=True),
    ]
    first = [1, len(tokenizer.encode("The capital is", bos=True))]
    cut = tokenizer.encode(long.rstrip() + "  Lima")
    behind = len(cut) - len(tokenizer.encode(long.rstrip()))
    wanted = [
        naive(model, whole[0], first[0]),
        naive(model, whole[1], first[1]),
        naive(model, whole[1], first[1]),
        naive(model, [bos, *cut[-LONGEST:]], LONGEST + 1 - behind),
    ]
    np.testing.assert_allclose([f[0] for f in found], [w[0] for w in wanted], atol=1e-4)
    assert [f[1] for f in found] == [w[1] for w in wanted]


def test_answers_end_at_stops_and_keep_to_the_window(model: Gemma4, tokenizer: Tokenizer) -> None:
    """If it fails, a task's stop strings or its limit are not those of its answers."""
    lm = adapter(model, tokenizer, batch_size=2)
    prompt = tokenizer.encode("The capital of Peru is", bos=True)
    plain = written(model, tokenizer, prompt, 8)
    (free,) = lm.generate_until(
        [request("The capital of Peru is", {"until": ["\n", "."], "max_gen_toks": 8})]
    )
    assert free == plain and len(free) > 3
    stop = free[2]
    arguments = {"until": [stop], "max_gen_toks": 8, "do_sample": False, "temperature": 0.7}
    found = lm.generate_until([request("The capital of Peru is", arguments)] * 3)
    assert found == [free.split(stop)[0]] * 3
    with pytest.raises(InputError, match="max_gen_toks 64 leaves no room for a prompt in 64"):
        lm.generate_until([request("Peru", {"until": [], "max_gen_toks": 64})])


TEMPLATE = """{{ bos_token }}{% for message in messages %}<|turn>{{ message.role }}
{{ message.content | trim }}<turn|>
{% endfor %}{% if add_generation_prompt %}<|turn>model
{% endif %}"""


def test_conversations_are_the_templates(model: Gemma4, tokenizer: Tokenizer) -> None:
    """If it fails, an instruction-tuned model is asked in turns it never saw, or a question's text ends a turn."""
    lm = adapter(model, tokenizer, chat_template=TEMPLATE)
    asked = "Is <turn|> a mark, and <s> too?"
    prompt = lm.apply_chat_template([{"role": "user", "content": asked}])
    begin, end = (tokenizer.id_of(symbol) for symbol in SYMBOLS[:2])
    ids = lm.tok_encode(prompt)
    assert ids[:2] == [tokenizer.bos_id, begin] and ids.count(tokenizer.bos_id) == 1
    assert (ids.count(begin), ids.count(end)) == (2, 1)
    assert asked in tokenizer.decode(ids)
    open_answer = [{"role": "user", "content": "Hi"}, {"role": "model", "content": "Lima is"}]
    assert lm.apply_chat_template(open_answer, add_generation_prompt=False).endswith("\nLima is")
    with pytest.raises(InputError, match="no chat template travels with the checkpoint"):
        adapter(model, tokenizer).apply_chat_template(open_answer)
    from gemma_qat.evals.harness import run_tasks

    found = run_tasks(
        {"it": model},
        tokenizer,
        ["capitals_choice"],
        task_folder=TASKS,
        chat_template=TEMPLATE,
        shots=1,
    )
    assert found["tasks"]["capitals_choice"]["shots"] == 1


def test_a_model_on_a_mesh(model: Gemma4, tokenizer: Tokenizer) -> None:
    """As many devices as there are: if it fails, placed models cannot be measured, or measure something else."""
    mesh = MeshConfig(fsdp=len(jax.devices()))
    placement = Placement(make_mesh(mesh), mesh.preset)
    where = leaf_shardings(model.config, {}, placement.mesh, mesh.preset)
    leaves = jax.device_put(model.leaves(), where)
    placed = Gemma4(model.config, leaves, {}, RunOptions(), placement)
    asked = [request("The capital of Peru is", " Lima"), request("", "Oslo")]
    whole, parts = (adapter(m, tokenizer).loglikelihood(asked) for m in (model, placed))
    np.testing.assert_allclose([f[0] for f in parts], [f[0] for f in whole], rtol=1e-5)
    answer = [request("The capital of Peru is", {"until": ["\n"], "max_gen_toks": 4})]
    assert adapter(placed, tokenizer).generate_until(answer) == adapter(
        model, tokenizer
    ).generate_until(answer)


def test_what_there_is_none_of_is_said(model: Gemma4, tokenizer: Tokenizer, tmp_path) -> None:
    """If it fails, a misspelt task ends in somebody else's traceback."""
    from gemma_qat.evals.harness import run_tasks

    with pytest.raises(
        InputError, match=r"unknown task 'capitals_choise'.*nearest: capitals_choice"
    ):
        run_tasks({"m": model}, tokenizer, ["capitals_choise"], task_folder=TASKS)
    with pytest.raises(InputError, match="no such folder of tasks"):
        run_tasks({"m": model}, tokenizer, NAMES, task_folder=tmp_path / "none")
