"""The float model or the text as target, by how long is trained, beside a float control: see README.md."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.study import Result, Scale, Study, Twin, from_twin, said, swept, table, twins
from gemma_qat.config import Cell, PtqCell, TrainCell
from gemma_qat.evals.plots import INK, SEQUENCE, figure_of, grid, legend_above, plain_decades

FOLDER = Path(__file__).resolve().parent
SIZE = "tiny_e2b"
RECIPES = ("q4_0", "w2")
STEPS = (50, 100, 200, 400)
ROUNDED, TEXT, TEACHER = "mse", "ce", "kl"
CONTROLS = {"q4_0": "float at q4_0's rate", "w2": "float at w2's rate"}
"""The float model trained on with the same optimizer as a recipe."""
LINES = (
    *((recipe, loss) for recipe in RECIPES for loss in (TEXT, TEACHER)),
    *((control, TEXT) for control in CONTROLS.values()),
)
"""What is trained, and its target."""
TITLES = {TEXT: "the text", TEACHER: "the float model"}


def measure(scale: Scale) -> Result:
    """Returns loss gap and divergence of every recipe, target and number of steps, beside one twin."""
    steps = [scale.steps(count) for count in (STEPS[2:] if scale.tiny else STEPS)]
    twin = next(twins(SIZE, scale))
    beside = {
        _cell(recipe, loss, count): _cell(CONTROLS[recipe], TEXT, count)
        for recipe, loss in LINES
        if recipe in CONTROLS
        for count in steps
    }
    cells = swept("distillation", _cells(twin, steps), twin, scale, beside)
    return {"steps": steps, "cells": cells}


def _cells(twin: Twin, steps: Sequence[int]) -> list[Cell]:
    cells: list[Cell] = []
    for recipe in RECIPES:
        config = from_twin(twin, recipe)
        cells.append(PtqCell(name=f"{recipe}-{ROUNDED}", config=config, method="mse"))
    for name, loss in LINES:
        recipe = next((r for r, control in CONTROLS.items() if control == name), name)
        for count in steps:
            config = from_twin(twin, recipe, count, loss)
            if recipe != name:
                config = dataclasses.replace(config, recipe="float")
            cells.append(TrainCell(name=_cell(name, loss, count), config=config))
    return cells


def _cell(name: str, loss: str, steps: int) -> str:
    return f"{name.replace(' ', '_').replace(chr(39), '')}-{loss}-{steps}"


def tables(result: Result) -> str:
    """Returns the table of the README."""
    cells, rows = result["cells"], []
    for recipe in RECIPES:
        one = cells[f"{recipe}-{ROUNDED}"]
        rows.append([recipe, "untrained, least squares", "", *_figures(one), ""])
    for recipe, loss in LINES:
        for count in result["steps"]:
            one = cells[_cell(recipe, loss, count)]
            beside = said(one["beside"], "{:+.4f}") if "beside" in one else ""
            rows.append([recipe, TITLES[loss], str(count), *_figures(one), beside])
    headings = ("recipe", "target", "steps", "loss gap", "KL to the float model")
    return table((*headings, "loss beside the control's"), rows)


def _figures(one: Result) -> tuple[str, str]:
    return said(one["loss_gap"], "{:+.4f}"), said(one["kl_mean"])


def plot(result: Result) -> bytes:
    """Returns loss gap and divergence against steps."""
    cells, steps = result["cells"], result["steps"]
    labels = [f"{recipe}, target {TITLES[loss]}" for recipe, loss in LINES]

    def draw(axes: Any) -> None:
        for one, key, title in ((axes[0], "loss_gap", "loss gap"), (axes[1], "kl_mean", "mean KL")):
            for number, (recipe, loss) in enumerate(LINES):
                values = [cells[_cell(recipe, loss, count)][key]["value"] for count in steps]
                dash = "--" if recipe not in RECIPES else "-"
                style = {"color": SEQUENCE[number], "label": labels[number]}
                one.plot(steps, values, dash, marker="o", markersize=3, **style)
            one.set(xlabel="training steps", ylabel=f"{title} (nats per token)")
            grid(one)
        axes[0].axhline(0, color=INK, linewidth=0.8)
        axes[1].set_yscale("log")
        plain_decades(axes[1].yaxis)
        legend_above(axes[0], labels)

    return figure_of(draw, "png", (7.6, 3.0), panels=2, sharey=False, entries=labels)


if __name__ == "__main__":
    Study(folder=FOLDER, measure=measure, tables=tables, plot=plot).main()
