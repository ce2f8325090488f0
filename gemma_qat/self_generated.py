"""Text that a model writes itself, as token ids to distil from: QAT without a corpus.

    OUT/rows.jsonl      {"ids": [2, 651, ...]} a line: `bos`, what the model says, `eos` where it ended; the last thing
    OUT/card.json       what they depend on
    OUT/00042.part      rows 42 * batch_size and on, until rows.jsonl is there

What the float model gives its own text is in its distribution, so KL on it says what QAT wants to know wherever the
model will go by itself. `data.kind=jsonl data.format=ids data.path=OUT` trains on it: ids are kept, never turned into
text, which has other ids for the same characters.

By default every token is drawn from the model's softmax, so rows are samples of what it believes text to be. LLM-QAT
begins each row with a token of the vocabulary, lets the model go on greedily for a few tokens, then draws:
`start="vocabulary"`, `greedy` 2 to 4. Over a large vocabulary most of whose entries begin no text (control, unused,
other scripts) that is a strange beginning, so it is no default; there is no `bos` before it in the paper's code, here
there is.

A row is a function of (model, settings, seed, its number): every row has a key of its own, and the last batch is filled
up, so that all run through one program. So a run that was stopped goes on at the next part.

Source: LLM-QAT (Liu et al. 2023, arXiv 2305.17888) and facebookresearch/LLM-QAT `generate_data.py`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gemma_qat.checkpoint.appear import appearing_file
from gemma_qat.decode import Sampling, generate
from gemma_qat.errors import InputError, refuse_address, refuse_outside, unknown
from gemma_qat.models import Gemma4

Progress = Callable[[str, int, int], None]
STARTS = ("model", "vocabulary")
ROWS, CARD = "rows.jsonl", "card.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelfConfig:
    """How a model writes rows.

    `start`: what follows `bos` is drawn from the model, or is any token of its vocabulary. The `greedy` tokens behind
    that are the likeliest, the rest drawn as `Sampling` says. Rows end at `eos`, or at `length`.
    Units: `length` in tokens with `bos`; `batch_size` rows at a time.
    """

    rows: int
    length: int
    bos: int
    eos: int
    seed: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    start: str = "model"
    greedy: int = 0
    batch_size: int = 32

    def __post_init__(self) -> None:
        for name, least in (
            ("rows", 1), ("length", 2), ("bos", 0), ("eos", 0), ("seed", 0), ("greedy", 0), ("batch_size", 1),
        ):  # fmt: skip
            refuse_outside(name, getattr(self, name), least)
        if self.start not in STARTS:
            raise unknown("start", self.start, STARTS)
        if self.greedy > self.length - 2:
            raise InputError(f"greedy {self.greedy} leaves nothing to draw in {self.length} tokens")
        self.sampling  # noqa: B018 - its own checks

    @property
    def sampling(self) -> Sampling:
        """How tokens are drawn."""
        return Sampling(
            temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, seed=self.seed
        )


def rows_of(model: Gemma4, config: SelfConfig, first: int) -> list[list[int]]:
    """Returns rows `first` to `first` + `batch_size` - 1, whether or not so many are asked for."""
    numbers = np.arange(first, first + config.batch_size)
    root = jax.random.key(config.seed)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(root, numbers)
    said = np.full((len(numbers), 1), config.bos, np.int32)
    beginning, drawn = jax.vmap(lambda key: jax.random.split(key))(keys).T
    if config.start == "vocabulary":
        vocab = model.config.vocab_size
        picked = jax.vmap(lambda key: jax.random.randint(key, (), 0, vocab))(beginning)
        said = np.concatenate([said, np.asarray(picked, np.int32)[:, None]], axis=1)
    if config.greedy:
        more = min(config.greedy, config.length - said.shape[1])
        if config.start == "model":  # what the model says first is drawn: greedily all rows are one
            said = np.concatenate([said, _more(model, config, said, 1, beginning)], axis=1)
            more = min(config.greedy, config.length - said.shape[1])
        if more:
            said = np.concatenate([said, generate(model, said, max_new_tokens=more)], axis=1)
    if said.shape[1] < config.length:
        rest = _more(model, config, said, config.length - said.shape[1], drawn)
        said = np.concatenate([said, rest], axis=1)
    return [_ended(row, config.eos) for row in said.tolist()]


def _more(
    model: Gemma4, config: SelfConfig, said: np.ndarray, count: int, keys: jax.Array
) -> np.ndarray:
    return generate(
        model, said, max_new_tokens=count, temperature=config.temperature, top_k=config.top_k,
        top_p=config.top_p, stop_tokens=[config.eos], keys=keys,
    )  # fmt: skip


def _ended(row: list[int], eos: int) -> list[int]:
    """The row to its first `eos` behind `bos`."""
    return row[: row.index(eos, 1) + 1] if eos in row[1:] else row


def self_generate(
    model: Gemma4,
    out: Path,
    config: SelfConfig,
    source: str = "",
    progress: Progress | None = None,
) -> dict[str, int]:
    """Writes rows that `model` says to `out`/rows.jsonl and returns how many there are: rows, tokens, ended.

    `source` names the model, so that a folder of another's rows is refused. What is complete is not made again; a call
    that was stopped goes on.
    Raises: InputError for a row longer than the model's positions, a token it has not, a folder of something else.
    """
    if config.length > model.config.max_positions:
        raise InputError(
            f"length {config.length} exceeds the model's {model.config.max_positions} positions"
        )
    for name in ("bos", "eos"):
        if getattr(config, name) >= model.config.vocab_size:
            raise InputError(f"{name} {getattr(config, name)} is outside the model's vocabulary")
    _begin(out, {"source": source} | dataclasses.asdict(config))
    rows = out / ROWS
    firsts = range(0, config.rows, config.batch_size)
    if not rows.is_file():
        for done, first in enumerate(firsts, start=1):
            part = out / f"{first // config.batch_size:05d}.part"
            if not part.is_file():
                _write(part, rows_of(model, config, first)[: config.rows - first])
            if progress is not None:
                progress("self-generate", min(done * config.batch_size, config.rows), config.rows)
        parts = [out / f"{first // config.batch_size:05d}.part" for first in firsts]
        with appearing_file(rows) as file, file.open("wb") as joined:
            for part in parts:
                joined.write(part.read_bytes())
    for part in out.glob("*.part"):
        part.unlink()
    return _counted(rows, config.eos)


def _write(path: Path, rows: list[list[int]]) -> None:
    with appearing_file(path) as file:
        file.write_text("".join(json.dumps({"ids": row}) + "\n" for row in rows), "utf-8")


def _begin(out: Path, card: dict[str, Any]) -> None:
    """Says what is made here, unless that is said already; refuses a folder of something else."""
    refuse_address(out)
    file = out / CARD
    if not file.is_file():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(f"{out}: holds something else; give a new or empty folder")
        out.mkdir(parents=True, exist_ok=True)
        with appearing_file(file) as new:
            new.write_text(json.dumps(card, indent=1) + "\n", "utf-8")
        return
    try:
        before = json.loads(file.read_text("utf-8"))
    except ValueError:
        before = None
    if not isinstance(before, dict):
        raise InputError(f"{file}: a card of self-generated rows expected")
    differ = [
        f"{name}={before.get(name)}, now {now}"
        for name, now in card.items()
        if before.get(name) != now
    ]
    if differ:
        raise InputError(f"{out}: rows made with {differ[0]}; give another folder")


def _counted(rows: Path, eos: int) -> dict[str, int]:
    count = tokens = ended = 0
    with rows.open("rb") as file:
        for line in file:
            ids = json.loads(line)["ids"]
            count, tokens, ended = count + 1, tokens + len(ids), ended + (ids[-1] == eos)
    return {"rows": count, "tokens": tokens, "ended": ended}
