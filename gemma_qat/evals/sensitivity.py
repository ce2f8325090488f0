"""What quantizing a class of sites costs: KL to the float model that it adds, beside the bytes that it saves.

One class at a time is put on a grid, everything else stays in float (`variants.py`); the float model's hidden states
are there already (`reference.py`), so a row of the table is one pass over the text. Its divergence is what that class
adds on its own. Small effects of several classes nearly add up, large ones need not: whoever adds them measures the
result.

The other way round, `restored` is what a model loses less when all but that class is quantized: it sees the class
among the errors of the others. The two agree where effects add up.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gemma_qat.data.packing import Rows
from gemma_qat.evals.bootstrap import Resamples
from gemma_qat.evals.records import TokenRecords
from gemma_qat.evals.reference import Progress, Reference
from gemma_qat.evals.score import score
from gemma_qat.evals.summary import estimates, paired_difference
from gemma_qat.evals.variants import Variants
from gemma_qat.numerics import Grid
from gemma_qat.quant.classes import SiteClass

STATISTICS = ("kl_mean", "perplexity_ratio", "top1_agreement")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """A class of sites and the grids its sites may be put on, called `format`; sites without one stay in float."""

    of: SiteClass
    format: str
    grids: Mapping[str, Grid]

    @property
    def bytes(self) -> float:
        """Stored bytes of the class."""
        return self.of.bytes(self.grids)


@dataclasses.dataclass(kw_only=True)
class Bench:
    """Measures variants of one float model, all with the same draws of documents.

    Shapes: token_bytes int64 [V].
    """

    variants: Variants
    reference: Reference
    rows: Rows
    token_bytes: np.ndarray
    batch_size: int
    seed: int
    draws: int
    resamples: Resamples | None = None

    def records(self, grids: Mapping[str, Grid], *, last: bool = False) -> TokenRecords:
        """Returns the records of the variant with those sites on their grids; after the `last` the floats are gone."""
        _, found = score(
            {"variant": self.variants.on(grids, last=last)}, self.reference, self.rows, self.token_bytes,
            batch_size=self.batch_size,
        )  # fmt: skip
        return found["variant"]

    def drawn(self, records: TokenRecords) -> Resamples:
        """Returns the draws of documents, made when the first records are there."""
        if self.resamples is None:
            self.resamples = Resamples(records.documents, seed=self.seed, draws=self.draws)
        return self.resamples

    def measured(self, records: TokenRecords) -> dict[str, Any]:
        """Returns the statistics of a variant, each with its interval."""
        return dict(estimates(records, self.drawn(records), STATISTICS))


def rank(
    bench: Bench, choices: Sequence[Choice], progress: Progress | None = None
) -> list[dict[str, Any]]:
    """Returns a row per choice, the largest KL first.

    Units: bytes as stored, scales included; `saved` against bfloat16; `kl_per_mb` nats per 1e6 bytes saved, none where
    nothing is saved; `share` of the sum of all rows, where no class has several.
    """
    rows = []
    for number, choice in enumerate(choices):
        rows.append(_row(choice, bench.measured(bench.records(choice.grids))))
        if progress:
            progress("sensitivity", number + 1, len(choices))
    total = sum(row["kl_mean"]["value"] for row in rows)
    adds_up = total > 0 and len({row["class"] for row in rows}) == len(rows)
    for row in rows:
        row["share"] = row["kl_mean"]["value"] / total if adds_up else None
    return sorted(rows, key=lambda row: -row["kl_mean"]["value"])


def add_restored(
    bench: Bench, rows: Sequence[dict[str, Any]], choices: Sequence[Choice], whole: TokenRecords,
    progress: Progress | None = None,
) -> None:  # fmt: skip
    """Writes into each row what is lost less when that class stays in float, all others on their grids."""
    every = {path: grid for choice in choices for path, grid in choice.grids.items()}
    by_name = {row["class"]: row for row in rows}
    for number, choice in enumerate(choices):
        others = {path: grid for path, grid in every.items() if path not in choice.grids}
        difference = paired_difference(whole, bench.records(others), bench.drawn(whole))
        by_name[choice.of.name]["restored"] = difference["kl_mean"]
        if progress:
            progress("all but one", number + 1, len(choices))


def _row(choice: Choice, measured: dict[str, Any]) -> dict[str, Any]:
    float_bytes, size = choice.of.bytes({}), choice.bytes
    saved = float_bytes - size
    return {
        "class": choice.of.name,
        "format": choice.format,
        "bits": 8 * size / choice.of.weights,
        "sites": len(choice.of.sites),
        "weights": choice.of.weights,
        "bytes": size,
        "float_bytes": float_bytes,
        "saved": saved,
        **measured,
        "kl_per_mb": 1e6 * measured["kl_mean"]["value"] / saved if saved > 0 else None,
    }
