"""Trains on rows that continue a text with and without `<bos>`, and measures both on held-out rows.

    python experiments/bos/run.py             trains what is not there, measures, writes result.json and plot.png
    python experiments/bos/run.py --tiny      the same in a few steps, to see that it works; writes to runs/ alone
    python experiments/bos/run.py --plot      plot.png from result.json

Text: split `train` of the standard library to train on, `validation` to measure on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from gemma_qat import api
from gemma_qat.config import DataConfig, ExperimentConfig
from gemma_qat.data import Tokenizer, pack
from gemma_qat.data.encode import encoder
from gemma_qat.data.held_out import Corpus, first_rows, held_out, open_corpus
from gemma_qat.data.token_bytes import token_bytes
from gemma_qat.evals import Resamples, TokenRecords, paired_difference
from gemma_qat.evals.plots import COLOURS, figure_of
from gemma_qat.evals.score import score
from gemma_qat.evals.summary import summarize_part
from gemma_qat.train import OptimizerConfig, TrainConfig
from gemma_qat.training import run

HERE = Path(__file__).resolve().parent
LENGTH, ROWS_PER_DOCUMENT, DRAWS = 128, 16, 2000
ARMS = {"without": False, "with": True}


def floats(folder: Path, steps: int, seeds: int) -> dict[str, ExperimentConfig]:
    """Returns the float runs: each arm with each seed."""
    base = ExperimentConfig(
        name="", model="tiny_e2b", directory=str(folder),
        data=DataConfig(path=str(folder / "data"), length=LENGTH),
        train=TrainConfig(steps=steps, batch_size=8, tensorboard=False, watch_codes=False),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup=min(50, steps)),
    )  # fmt: skip
    return {
        f"{arm}-{seed}": dataclasses.replace(
            base, name=f"{arm}-{seed}",
            data=dataclasses.replace(base.data, bos_in_every_piece=bos),
            train=dataclasses.replace(base.train, seed=seed),
        )
        for seed in range(seeds) for arm, bos in ARMS.items()
    }  # fmt: skip


def distilled(
    config: ExperimentConfig, teacher: str, steps: int, seeds: int
) -> dict[str, ExperimentConfig]:
    """Returns QAT on KL to a teacher that has always seen `<bos>` first, as released checkpoints have."""
    return {
        f"q4_0-{arm}-{seed}": dataclasses.replace(
            config, name=f"q4_0-{arm}-{seed}", recipe="q4_0", start=teacher,
            data=dataclasses.replace(config.data, bos_in_every_piece=bos),
            train=dataclasses.replace(config.train, steps=steps, loss="kl", seed=seed),
            optimizer=OptimizerConfig(
                learning_rate=3e-4, scale_learning_rate=1e-3, warmup=min(20, steps)
            ),
        )
        for seed in range(1, seeds + 1) for arm, bos in ARMS.items()
    }  # fmt: skip


def measured(folder: Path, names: list[str], quantized: list[str]) -> dict[str, Any]:
    """Returns the loss of the float models, the KL of the others to `with-0`, and differences of the arms in pairs."""
    corpus = Corpus(path=str(folder / "data"), kind="stdlib", split="validation")
    tokenizer = Tokenizer.load(folder / "data" / "tokenizer.model")
    sizes = token_bytes(tokenizer)
    rows = first_rows(held_out([corpus], tokenizer, LENGTH).rows, ROWS_PER_DOCUMENT)
    texts = [one.ids for one in encoder(tokenizer, "text")(list(open_corpus(corpus)))]
    bare = first_rows(pack(texts, LENGTH, mix=False), ROWS_PER_DOCUMENT)
    reference = api.load(folder / "with-0")
    students = {name: api.load(folder / name) for name in names}
    _, records = score(students, reference, rows, sizes)
    _, on_bare = score(students, reference, bare, sizes)
    _, trained = score(
        {name: api.load(folder / name, packed=True) for name in quantized}, reference, rows, sizes
    )
    every = records | trained
    draws = Resamples(next(iter(every.values())).documents, seed=0, draws=DRAWS)
    pairs = [(f"{name}", name.replace("without", "with")) for name in every if "without" in name]
    return {
        "text": {"split": "validation", "documents": records["with-0"].documents, "tokens": records["with-0"].tokens},
        "loss": {name: float(one.nll.mean()) for name, one in records.items()},
        "loss_without_bos": {name: _continuing(one, bare) for name, one in on_bare.items()},
        "loss_with_bos": {name: _continuing(one, rows) for name, one in records.items()},
        "loss_where_texts_begin": {name: _beginning(one, rows) for name, one in records.items()},
        "kl": {name: float(one.kl.mean()) for name, one in trained.items()},
        "q4_0_loss": {name: float(one.nll.mean()) for name, one in trained.items()},
        "difference": {
            name: {
                key: paired_difference(every[name], every[other], draws)[key]
                for key in (("kl_mean", "nll") if name in trained else ("nll",))
            }
            for name, other in pairs
        },
        "positions": {name: _positions(one) for name, one in every.items()},
    }  # fmt: skip


def _continues(rows: Any) -> np.ndarray:
    """Returns of every scored token whether its row continues a text: is not its document's first."""
    document = rows.documents[:, 0]
    first = np.r_[True, document[1:] != document[:-1]]
    return np.repeat(~first, [int((row[1:] > 0).sum()) for row in rows.segments])


def _continuing(records: TokenRecords, rows: Any) -> float:
    """Returns the loss on rows that continue a text."""
    return float(records.nll[_continues(rows)].mean())


def _beginning(records: TokenRecords, rows: Any) -> float:
    """Returns the loss on the first eight tokens of documents, where `<bos>` means that a text begins."""
    return float(records.nll[~_continues(rows) & (records.position <= 8)].mean())


def _positions(records: TokenRecords) -> list[dict[str, Any]]:
    """Returns loss and KL by how many tokens stand before one: 1, 2 to 3, 4 to 7, ..."""
    starts = [2**power for power in range(LENGTH.bit_length() - 1)]
    parts = [
        (start, (records.position >= start) & (records.position < 2 * start)) for start in starts
    ]
    found = [(start, summarize_part(records, mask, seed=0, draws=100)) for start, mask in parts]
    return [
        {"from": start, "nll": part["nll"]["value"], "kl": part["kl_mean"]["value"]}
        for start, part in found
    ]


def plotted(result: dict[str, Any]) -> bytes:
    """Returns loss of the float models, and KL of the quantized, by position; a line a run."""
    kinds = (("nll", "loss, nats per token", ""), ("kl", "KL to float, nats per token", "q4_0-"))

    def draw(axes: Any) -> None:
        for ax, (key, label, prefix) in zip(axes, kinds, strict=True):
            for arm, colour in zip(ARMS, (COLOURS["rtn"], COLOURS["qat"]), strict=True):
                names = [n for n in result["positions"] if n.startswith(f"{prefix}{arm}-")]
                for number, name in enumerate(names):
                    parts = result["positions"][name]
                    ax.plot(
                        [part["from"] for part in parts], [part[key] for part in parts],
                        color=colour, label=f"rows {arm} <bos>" if not number else None,
                    )  # fmt: skip
            ax.set_xscale("log", base=2)
            ax.set(xlabel="tokens before", ylabel=label)
        axes[0].legend()

    return figure_of(draw, "png", size=(8.0, 3.2), panels=2, sharey=False)


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="few steps; nothing is written here")
    parser.add_argument("--plot", action="store_true", help="the plot alone, from result.json")
    asked = parser.parse_args()
    out = Path("runs/bos_tiny") if asked.tiny else HERE
    if not asked.plot:
        folder = Path("runs/bos_tiny" if asked.tiny else "runs/bos")
        steps, more = (4, 2) if asked.tiny else (300, 100)
        seeds = 1 if asked.tiny else 2
        configs = floats(folder, steps, seeds)
        configs |= distilled(configs["with-0"], str(folder / "with-0"), more, seeds)
        for name, config in configs.items():
            print(name, flush=True)
            run(config)
        quantized = [name for name in configs if name.startswith("q4_0")]
        result = measured(folder, [n for n in configs if n not in quantized], quantized)
        result["settings"] = {"steps": steps, "q4_0_steps": more, "batch": 8, "length": LENGTH}
        (out / "result.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    result = json.loads((out / "result.json").read_text("utf-8"))
    (out / "plot.png").write_bytes(plotted(result))


if __name__ == "__main__":
    main()
