"""What a training step costs by recipe, in time and in memory, beside a float step: see README.md."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from experiments.study import Result, Scale, Study, bars, said, table
from gemma_qat.cli.console import progress
from gemma_qat.evals.bench_train import Shape, bench_train
from gemma_qat.models import size_named
from gemma_qat.quant import RECIPE_NAMES

FOLDER = Path(__file__).resolve().parent
SIZE = "tiny_e2b"


def measure(scale: Scale) -> Result:
    """Returns the cost of every recipe's step, in turn in one process; what `gemma-qat bench train` measures."""
    recipes = ("q4_0", "mobile") if scale.tiny else RECIPE_NAMES
    shape, rounds = Shape(size=size_named(SIZE)), 2 if scale.tiny else 25
    with progress() as report:
        costs = bench_train(shape, recipes, distils=("q4_0",), rounds=rounds, progress=report)
    return {
        "size": SIZE, "rows": shape.rows, "length": shape.length, "rounds": rounds,
        "costs": [dataclasses.asdict(cost) for cost in costs],
    }  # fmt: skip


def tables(result: Result) -> str:
    """Returns the table of the README."""
    rows = [
        [cost["name"], f"{1e3 * cost['seconds']:.0f}", f"{1e3 * cost['least']:.0f} to {1e3 * cost['most']:.0f}",
         said(_ratio(cost), "{:.2f}"), f"{cost['bytes'] / 1e6:.1f}", f"{cost['memory_ratio']:.2f}"]
        for cost in result["costs"]
    ]  # fmt: skip
    headings = ("step", "ms, median", "least to most", "over float [quartiles]", "MB", "over float")
    return table(headings, rows)


def _ratio(cost: Result) -> Result:
    return {
        "value": cost["time_ratio"], "low": cost["time_ratio_low"], "high": cost["time_ratio_high"],
    }  # fmt: skip


def plot(result: Result) -> bytes:
    """Returns bars of time and memory over those of a float step."""
    rows: list[Any] = [
        (cost["name"], {"time": _ratio(cost), "memory": cost["memory_ratio"]})
        for cost in result["costs"]
        if cost["name"] != "float"
    ]
    return bars(rows, "over a float step")


if __name__ == "__main__":
    Study(folder=FOLDER, measure=measure, tables=tables, plot=plot).main()
