"""Rows that a model writes itself: what is written is what is trained on, and each row can be made again."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_qat import self_generated
from gemma_qat.checkpoint.native import save_model
from gemma_qat.config import DataConfig, ExperimentConfig
from gemma_qat.data.files import training_rows
from gemma_qat.errors import InputError
from gemma_qat.models import SIZES, Gemma4, ModelConfig, initialize
from gemma_qat.self_generated import SelfConfig, rows_of, self_generate
from gemma_qat.train import OptimizerConfig, TrainConfig
from gemma_qat.training import run

SIZE = ModelConfig(
    name="writer", layer_kinds=("sliding", "full"), vocab_size=61, width=32, query_heads=2, kv_heads=1,
    global_kv_heads=1, head_width=16, global_head_width=32, ffn_width=32, window=4, max_positions=64,
)  # fmt: skip
CONFIG = SelfConfig(rows=11, length=13, bos=2, eos=1, batch_size=4)


@pytest.fixture(scope="module")
def parameters() -> dict[str, Any]:
    """A fresh model: of what follows `bos` it holds one token in 61 to be likely 0.14, another 0.08."""
    return initialize(SIZE, 0)


@pytest.fixture(scope="module")
def model(parameters: dict[str, Any]) -> Gemma4:
    return Gemma4.from_parameters(SIZE, parameters)


def lines(out: Path) -> list[list[int]]:
    return [json.loads(line)["ids"] for line in (out / "rows.jsonl").read_text().splitlines()]


def test_ids_are_trained_on_as_they_were_written(model: Gemma4, tmp_path: Path) -> None:
    """If it fails, a run distils from other tokens than the model wrote, or needs a tokenizer that it has no use for."""
    made = self_generate(model, tmp_path / "own", CONFIG)
    written = lines(tmp_path / "own")
    ended = [row for row in written if row[-1] == CONFIG.eos]
    assert made == {"rows": 11, "tokens": sum(map(len, written)), "ended": len(ended)}
    assert all(row[0] == 2 and len(row) <= 13 and 1 not in row[1:-1] for row in written)
    assert all(len(row) == 13 for row in written if row not in ended)
    data = DataConfig(kind="jsonl", format="ids", path=str(tmp_path / "own"), length=13)
    rows = training_rows(data, tmp_path / "rows", vocab_size=61)
    every = rows[np.arange(len(rows))]
    for number, row in enumerate(written):
        assert every.tokens[every.documents == number].tolist() == row
    assert every.learn.sum() == made["tokens"]


def test_a_row_is_made_of_its_seed_and_number(
    model: Gemma4, tmp_path: Path, monkeypatch: Any
) -> None:
    """If it fails, a run that was stopped goes on with other text, or two seeds write the same."""
    whole = [row for first in (0, 4, 8) for row in rows_of(model, CONFIG, first)]
    assert len({tuple(row) for row in whole}) > 10
    other = rows_of(model, dataclasses.replace(CONFIG, seed=1), 0)
    assert not {tuple(row) for row in other} & {tuple(row) for row in whole}
    assert rows_of(model, CONFIG, 2) == whole[2:6], "a row depends on its neighbours"
    # Stopped behind the first part, and then told to go on.
    calls: list[int] = []

    def stopping(model: Gemma4, config: SelfConfig, first: int) -> list[list[int]]:
        calls.append(first)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return rows_of(model, config, first)

    monkeypatch.setattr(self_generated, "rows_of", stopping)
    with pytest.raises(KeyboardInterrupt):
        self_generate(model, tmp_path / "own", CONFIG)
    assert not (tmp_path / "own" / "rows.jsonl").exists()
    self_generate(model, tmp_path / "own", CONFIG)
    assert calls == [0, 4, 4, 8] and lines(tmp_path / "own") == whole[:11]
    self_generate(model, tmp_path / "own", CONFIG)
    assert calls == [0, 4, 4, 8], "made again"
    assert sorted(p.name for p in (tmp_path / "own").iterdir()) == ["card.json", "rows.jsonl"]


def test_tokens_are_drawn_as_the_model_says(model: Gemma4) -> None:
    """If it fails, self-generated text is of another distribution than the model's own."""
    how = dataclasses.replace(CONFIG, length=2, batch_size=4000)
    drawn = np.array([row[1] for row in rows_of(model, how, 0)])
    one = jnp.asarray([[2]])
    logits = model(one, jnp.zeros_like(one), jnp.ones_like(one))
    logits = logits[0] if isinstance(logits, tuple) else logits
    wanted = np.asarray(jax.nn.softmax(logits[0, 0]))
    assert wanted.max() > 3 / 61, "nothing to tell from a uniform distribution"
    counts = np.bincount(drawn, minlength=61)
    # Chi-squared over tokens expected at least five times: mean k, variance 2 k for k degrees of freedom; five deviations.
    often = wanted * 4000 >= 5
    squares = (counts - wanted * 4000)[often] ** 2 / (wanted * 4000)[often]
    freedom = int(often.sum()) - 1
    assert squares.sum() < freedom + 5 * np.sqrt(2 * freedom)


def test_the_beginning_of_the_paper(model: Gemma4) -> None:
    """If it fails, rows begin otherwise than LLM-QAT's: any token, some greedy ones, then drawn ones."""
    how = dataclasses.replace(CONFIG, start="vocabulary", greedy=3, batch_size=64, eos=60)
    rows = [row for row in rows_of(model, how, 0) if len(row) == 13]
    assert len({row[1] for row in rows}) > 25
    by_beginning: dict[int, set[tuple[int, ...]]] = {}
    for row in rows:
        by_beginning.setdefault(row[1], set()).add(tuple(row[2:5]))
    assert max(map(len, by_beginning.values())) == 1, (
        "what is greedy follows from what stands before"
    )
    assert len({tuple(row) for row in rows}) == len(rows)


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"length": 1}, "length=1: at least 2"),
        ({"rows": 0}, "rows=0: at least 1"),
        ({"start": "paper"}, "start"),
        ({"greedy": 12}, "greedy 12 leaves nothing to draw in 13"),
        ({"temperature": -1.0}, "temperature"),
        ({"length": 65}, "length 65 exceeds the model's 64 positions"),
        ({"eos": 61}, "eos 61 is outside the model's vocabulary"),
    ],
)
def test_what_cannot_be_written_is_one_line(
    changed: dict[str, Any], match: str, model: Gemma4, tmp_path: Path
) -> None:
    """If it fails, bad input ends in a traceback, or leaves a folder behind."""
    with pytest.raises(InputError, match=match):
        self_generate(model, tmp_path / "own", dataclasses.replace(CONFIG, **changed))
    assert not (tmp_path / "own").exists()


def test_a_folder_of_something_else_is_refused(model: Gemma4, tmp_path: Path) -> None:
    """If it fails, rows of another seed or model are taken for these, or a person's files are mixed with them."""
    self_generate(model, tmp_path / "own", dataclasses.replace(CONFIG, rows=2))
    with pytest.raises(InputError, match="rows made with seed=0, now 5; give another folder"):
        self_generate(model, tmp_path / "own", dataclasses.replace(CONFIG, rows=2, seed=5))
    with pytest.raises(InputError, match="source=, now b"):
        self_generate(model, tmp_path / "own", dataclasses.replace(CONFIG, rows=2), "b")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "text").write_text("mine")
    with pytest.raises(InputError, match="holds something else"):
        self_generate(model, tmp_path / "mine", CONFIG)


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ('{"ids": []}', "rows.jsonl:2: no token ids in it"),
        ('{"ids": [2, "a"]}', "rows.jsonl:2: token ids below 61 expected, 'a' is none"),
        ('{"ids": [2, 61]}', "rows.jsonl:2: token ids below 61 expected, 61 is none"),
        ('{"ids": [2, -1]}', "-1 is none"),
        ('{"ids": [2, true]}', "True is none"),
        ('{"ids": 2}', "rows.jsonl:2: expected an object with a list of token ids under 'ids'"),
        ('{"text": "a"}', "expected an object with a list of token ids under 'ids'"),
    ],
)
def test_a_line_that_is_no_ids(line: str, match: str, tmp_path: Path) -> None:
    """If it fails, a bad line is trained on, or ends in a traceback that does not name it."""
    (tmp_path / "rows.jsonl").write_text(f'{{"ids": [2, 3]}}\n{line}\n')
    data = DataConfig(kind="jsonl", format="ids", path=str(tmp_path), length=8)
    with pytest.raises(InputError, match=match):
        training_rows(data, tmp_path / "made", vocab_size=61)


@pytest.mark.slow
def test_distilling_on_it_needs_no_text_and_lowers_kl(
    parameters: dict[str, Any], model: Gemma4, tmp_path: Path, known_sizes: None
) -> None:
    """If it fails, QAT on a model's own text does not bring the quantized model closer to it."""
    SIZES[SIZE.name] = SIZE
    save_model(tmp_path / "float", parameters, SIZE)
    self_generate(model, tmp_path / "own", dataclasses.replace(CONFIG, rows=64, batch_size=32))
    config = ExperimentConfig(
        name="qat", model=SIZE.name, recipe="w2", start=str(tmp_path / "float"), directory=str(tmp_path),
        data=DataConfig(kind="jsonl", format="ids", path=str(tmp_path / "own"), length=13),
        train=TrainConfig(steps=60, batch_size=16, loss="kl", log_every=5, tensorboard=False),
        optimizer=OptimizerConfig(learning_rate=3e-3, scale_learning_rate=1e-3, warmup=3),
    )  # fmt: skip
    trained = run(config)
    curve = [value for _, value in trained.curves["loss"]]
    assert np.mean(curve[-2:]) < 0.7 * curve[0]
