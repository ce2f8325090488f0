"""What the studies share: float twins, held-out text, and a folder's result, table and plot.

    python -m experiments.NAME.run           measures; writes result.json, plot.png and the tables in README.md
    python -m experiments.NAME.run --tiny    the same path in a few steps, into runs/studies/NAME_tiny
    python -m experiments.NAME.run --show    tables and plot again, of the result.json that is there

Twins are trained once for all studies, below runs/studies/twins, and go on where they were stopped. Every figure is of
tokens of the standard library's held-out files; intervals are of a bootstrap over files. With several twins (seeds of
the float training) their tokens are put together, file by file, and the figure of each stands beside.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gemma_qat import sweep, training
from gemma_qat.checkpoint.appear import appearing_file
from gemma_qat.cli.console import progress
from gemma_qat.config import Cell, DataConfig, ExperimentConfig, MeasureConfig, SweepConfig
from gemma_qat.data.files import training_rows
from gemma_qat.data.held_out import Corpus, first_rows, held_out
from gemma_qat.data.packing import Rows
from gemma_qat.data.token_bytes import token_bytes
from gemma_qat.evals import Resamples, TokenRecords, summarize
from gemma_qat.evals.environment import environment
from gemma_qat.evals.plots import INK, SEQUENCE, figure_of, grid, legend_above, plain_decades
from gemma_qat.evals.reference import Reference, reference_of
from gemma_qat.evals.score import score
from gemma_qat.evaluation import tokenizer_of
from gemma_qat.loading import load
from gemma_qat.models import SIZES, Gemma4, ModelConfig
from gemma_qat.sweep.figures import rounded
from gemma_qat.sweep.results import together
from gemma_qat.sweep.tables import table as table_lines
from gemma_qat.train import OptimizerConfig, TrainConfig

RUNS = Path("runs/studies")
STATISTICS = ("kl_mean", "loss_gap", "top1_agreement")
DATA = DataConfig(kind="stdlib", length=128)

Result = dict[str, Any]
Estimate = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """How much is measured: a study, or (`tiny`) its path in a few steps."""

    tiny: bool = False

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds of float twins."""
        return (0,) if self.tiny else (0, 1)

    @property
    def rows_per_document(self) -> int:
        """Held-out rows of 128 tokens a file."""
        return 1 if self.tiny else 24

    @property
    def draws(self) -> int:
        """Resamples of the bootstrap."""
        return 50 if self.tiny else 2000

    def steps(self, count: int) -> int:
        """Returns how many steps stand for `count` of them."""
        return max(2, count // 50) if self.tiny else count


@dataclasses.dataclass(frozen=True, kw_only=True)
class Twin:
    """A float model trained from nothing, and what it says of held-out rows."""

    path: Path
    model: Gemma4
    rows: Rows
    token_bytes: np.ndarray
    reference: Reference

    def records(self, model: Gemma4) -> TokenRecords:
        """Returns the records of a model's tokens beside this one's."""
        found = score({"student": model}, self.reference, self.rows, self.token_bytes)[1]
        return found["student"]

    def batches(self, count: int, size: int = 8) -> list[dict[str, np.ndarray]]:
        """Returns batches of training rows, for calibration: never the held-out ones."""
        rows = training_rows(
            DATA, self.path.parent / "rows", None, vocab_size=self.model.config.vocab_size
        )
        picked = np.random.default_rng(0).permutation(len(rows))[: count * size]
        found = rows[np.sort(picked)]
        names = ("tokens", "positions", "segments")
        return [
            {name: getattr(found, name)[at : at + size] for name in names}
            for at in range(0, count * size, size)
        ]


def twins(size: str | ModelConfig, scale: Scale, steps: int = 1000) -> Iterator[Twin]:
    """Yields the float twin of every seed, trained first where it is not there; a size of one's own is made known."""
    if isinstance(size, ModelConfig):
        SIZES[size.name] = size
    name = size.name if isinstance(size, ModelConfig) else size
    for seed in scale.seeds:
        yield _twin(name, scale, scale.steps(steps), seed)


def twin_config(size: str, steps: int, seed: int) -> ExperimentConfig:
    """Returns how a twin is trained."""
    return ExperimentConfig(
        name=f"{size}-{steps}-seed{seed}", model=size, data=DATA, directory=str(RUNS / "twins"),
        train=TrainConfig(steps=steps, batch_size=8, seed=seed, save_every=200, keep=1, tensorboard=False),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup=min(50, steps // 2)),
    )  # fmt: skip


def _twin(size: str, scale: Scale, steps: int, seed: int) -> Twin:
    config = twin_config(size, steps, seed)
    model = trained(config)
    tokenizer = tokenizer_of(config.folder)
    corpus = Corpus(path=DATA.path, kind="stdlib", split="test")
    rows = first_rows(held_out([corpus], tokenizer, DATA.length).rows, scale.rows_per_document)
    return Twin(
        path=config.folder, model=model, rows=rows, token_bytes=token_bytes(tokenizer),
        reference=reference_of(model, rows),
    )  # fmt: skip


def trained(config: ExperimentConfig) -> Gemma4:
    """Returns what a run ends with; it goes on where it was stopped, and one that is done is loaded."""
    with progress() as report:
        training.run(config, report)
    return load(config.folder)


def estimates(records: Sequence[TokenRecords], scale: Scale) -> Result:
    """Returns the statistics of a model over all twins, and the divergence with each."""
    whole = together(records)
    draws = Resamples(whole.documents, seed=0, draws=scale.draws)
    summary = summarize(whole, draws)
    return {name: summary[name] for name in STATISTICS} | {
        "each_twin": [float(one.kl.mean()) for one in records]
    }


def from_twin(twin: Twin, recipe: str, steps: int = 1, loss: str = "kl") -> ExperimentConfig:
    """Returns a config that begins with a twin and trains as the studies do, on the grid of a recipe.

    Learning rates are those that the comparison of methods picked (configs/compare_methods.py). The seed is no twin's,
    so that none sees the rows again that it began with.
    """
    rate, scales = (1e-3, 3e-3) if recipe in ("w2", "ternary", "mobile") else (3e-4, 1e-3)
    base = twin_config(twin.model.config.name, steps, 0)
    return dataclasses.replace(
        base, recipe=recipe, start=str(twin.path),
        train=dataclasses.replace(base.train, loss=loss, seed=100),
        optimizer=OptimizerConfig(learning_rate=rate, scale_learning_rate=scales, warmup=min(10, steps // 2)),
    )  # fmt: skip


def swept(
    name: str,
    cells: Sequence[Cell],
    twin: Twin,
    scale: Scale,
    beside: Mapping[str, str] = {},
) -> Result:
    """Returns of every cell of a sweep its bytes and statistics beside a twin.

    `beside` names cells and others, whose loss theirs is compared with in pairs: their `beside`.
    Raises: RuntimeError when a cell went wrong.
    """
    config = SweepConfig(
        name=f"{name}_tiny" if scale.tiny else name, cells=tuple(cells), reference=str(twin.path),
        directory=str(RUNS / "sweeps"),
        evaluation=MeasureConfig(
            length=DATA.length, rows_per_document=scale.rows_per_document, draws=scale.draws
        ),
    )  # fmt: skip
    with progress() as report:
        document = sweep(config, progress=report)
    if document["failed"]:
        raise RuntimeError(f"{name}: {document['failed']}")
    found = {
        cell: {"bytes": about["bytes"]} | {name: about["summary"][name] for name in STATISTICS}
        for cell, about in document["cells"].items()
    }
    group = {cell: name for name, one in document["groups"].items() for cell in one["cells"]}
    for one, other in beside.items():
        found[one]["beside"] = document["differences"][f"{group[one]}-{group[other]}"]["nll"]
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """A folder: what is measured, and how its result is told."""

    folder: Path
    measure: Callable[[Scale], Result]
    tables: Callable[[Result], str]
    plot: Callable[[Result], bytes]

    def main(self) -> None:
        """Runs the study as the command line asks."""
        parser = argparse.ArgumentParser(description=f"The study {self.folder.name}.")
        parser.add_argument("--tiny", action="store_true", help="the same path in a few steps")
        parser.add_argument("--show", action="store_true", help="tables and plot again")
        arguments = parser.parse_args()
        folder = RUNS / f"{self.folder.name}_tiny" if arguments.tiny else self.folder
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "result.json"
        if not arguments.show:
            scale = Scale(tiny=arguments.tiny)
            found = {"measured": rounded(self.measure(scale)), "environment": environment()}
            with appearing_file(file) as unfinished:
                unfinished.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
        if not file.is_file():
            parser.exit(
                2, f"{self.folder.name}: no {file} to show; without --show it is measured\n"
            )
        result = json.loads(file.read_text("utf-8"))["measured"]
        (folder / "plot.png").write_bytes(self.plot(result))
        tables = self.tables(result)
        print(tables)
        if not arguments.tiny:
            readme = folder / "README.md"
            readme.write_text(with_tables(readme.read_text("utf-8"), tables), "utf-8")


BEGIN, END = "<!-- tables of result.json: begin -->", "<!-- end -->"


def with_tables(text: str, tables: str) -> str:
    """Returns a README with its tables, between two marks, replaced.

    Raises: ValueError when the marks are not there.
    """
    if BEGIN not in text or END not in text.partition(BEGIN)[2]:
        raise ValueError(f"README.md: no {BEGIN} followed by {END}")
    return re.sub(
        f"{re.escape(BEGIN)}.*?{re.escape(END)}",
        lambda _: f"{BEGIN}\n\n{tables.strip()}\n\n{END}",
        text,
        flags=re.S,
    )


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table."""
    return "\n".join(table_lines(headings, rows))


def said(estimate: Estimate, form: str = "{:.4f}") -> str:
    """Returns a value with its interval: `0.0123 [0.0110, 0.0140]`."""
    value, low, high = (form.format(estimate[name]) for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def each(found: Mapping[str, Any]) -> str:
    """Returns the divergence with every twin."""
    return ", ".join(f"{value:.2g}" for value in found["each_twin"])


Bar = tuple[str, Mapping[str, Estimate | float]]
"""A label and its values by series."""


def bars(rows: Sequence[Bar], xlabel: str, *, log: bool = False, width: float = 6.4) -> bytes:
    """Returns horizontal bars as PNG, a group a row and a colour a series, with intervals where there are some."""
    series = list(dict.fromkeys(name for _, values in rows for name in values))
    step = 0.8 / len(series)

    def draw(axes: Any) -> None:
        for number, name in enumerate(series):
            shown = [(place, values) for place, (_, values) in enumerate(rows) if name in values]
            at = [place + step * (list(v).index(name) - (len(v) - 1) / 2) for place, v in shown]
            parts = [[_part(v[name], part) for _, v in shown] for part in ("value", "low", "high")]
            value, low, high = np.asarray(parts)
            axes.barh(
                at, value, height=0.9 * step, color=SEQUENCE[number % len(SEQUENCE)], label=name,
                xerr=[np.maximum(0, value - low), np.maximum(0, high - value)],
                error_kw={"ecolor": INK, "elinewidth": 1.0, "capsize": 2},
            )  # fmt: skip
        axes.set_yticks(range(len(rows)), [label for label, _ in rows])
        axes.invert_yaxis()
        if log:
            axes.set_xscale("log")
            plain_decades(axes.xaxis)
        else:
            axes.locator_params(axis="x", nbins=6)
        axes.set(xlabel=xlabel)
        grid(axes, "x")
        if len(series) > 1:
            legend_above(axes, series)

    tall = max(1.6, (0.16 + 0.14 * len(series)) * len(rows) + 0.7)
    return figure_of(draw, "png", (width, tall), entries=series if len(series) > 1 else ())


def _part(value: Estimate | float, part: str) -> float:
    """A part of an estimate; a plain value has no ends, and gets no mark of any."""
    if isinstance(value, Mapping):
        return float(value[part])
    return float(value) if part == "value" else math.nan
