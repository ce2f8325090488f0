"""Every figure that a report has data for: where it stands, what it says, and how to draw it.

One list for the page (SVG, inline) and for the files beside it (PNG), so that both show the same.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from gemma_qat.evals import plots
from gemma_qat.evals.figure import QUALITY, Figure
from gemma_qat.evals.figures_runs import of_benches, of_codes, of_curves, of_stored
from gemma_qat.evals.plot_quality import (
    by_category,
    by_position,
    kl_histogram,
    quality_against_bytes,
)

AGAINST_BYTES = (
    "How far predictions are from the reference's, against what a model takes to store. Lower and further left is "
    "better; bars are intervals; the stepped line is the Pareto front, what nothing else betters in both."
)
BY_POSITION = (
    (
        "kl_mean", "mean KL (nats per token)", 1.0,
        "Divergence by position: long documents degrade first, if anything does. Bands are intervals.",
    ),
    ("top1_agreement", "same top token (%)", 100.0, "Same first choice by position."),
)  # fmt: skip
HISTOGRAM = "Divergence token by token. A mean can hide a tail: what matters is that the whole hill moves left."


def figures_of(data: Mapping[str, Any]) -> list[Figure]:
    """Returns the figures that there is data for, in the order of the page, each with a name of its own."""
    every = [
        *_of_recipes(data), *_of_evaluations(data.get("evaluations", [])), *of_curves(data),
        *of_codes(data.get("runs", {})), *of_stored(data), *of_benches(data.get("benches", {})),
    ]  # fmt: skip
    named: dict[str, Figure] = {}
    for figure in every:
        stem = re.sub(r"[^A-Za-z0-9_+.]+", "-", figure.name).strip("-.")
        name, number = stem, 2
        while name in named:
            name, number = f"{stem}-{number}", number + 1
        named[name] = dataclasses.replace(figure, name=name)
    return list(named.values())


def model_styles(evaluation: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the colour and dash that each model of an evaluation has in every figure."""
    return plots.styles_of(evaluation["models"])


def _of_recipes(data: Mapping[str, Any]) -> Iterator[Figure]:
    points = _recipe_points(data)
    if points:
        yield Figure(
            name="quality_against_bytes", part=QUALITY,
            caption=f"{AGAINST_BYTES} Recipes of about equal size stand side by side.",
            draw=partial(quality_against_bytes, points),
        )  # fmt: skip
    histograms = data.get("kl_histograms")
    if histograms:
        yield Figure(
            name="kl_histogram", part=QUALITY, caption=HISTOGRAM,
            draw=partial(kl_histogram, histograms),
        )  # fmt: skip


def _recipe_points(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    points, sizes = [], []
    for recipe, section in data.get("recipes", {}).items():
        for method, summary in section.get("methods", {}).items():
            if "bytes" in section and "kl_mean" in summary:
                label = f"{recipe} {method}"
                points.append(_point(label, recipe, method, section["bytes"], summary["kl_mean"]))
        sizes.append(section.get("float_bytes"))
    known = [size for size in sizes if size]
    return points + ([_point("float", "", "float", max(known), 0.0)] if points and known else [])


def _point(label: str, recipe: str, method: str, size: plots.Number, kl: Any) -> dict[str, Any]:
    estimate = kl if isinstance(kl, Mapping) else {"value": kl}
    return {
        "label": label, "recipe": recipe, "method": method, "bytes": size, "kl": estimate["value"],
        "low": estimate.get("low"), "high": estimate.get("high"),
    }  # fmt: skip


def _of_evaluations(found: Sequence[Mapping[str, Any]]) -> Iterator[Figure]:
    for number, evaluation in enumerate(found):
        where = f"_{number + 1}" if len(found) > 1 else ""
        for figure in _of_evaluation(evaluation):
            yield dataclasses.replace(
                figure, name=f"{figure.name}{where}", part=f"{figure.part}{number}"
            )


def _of_evaluation(evaluation: Mapping[str, Any]) -> Iterator[Figure]:
    models, styles = evaluation["models"], model_styles(evaluation)
    points = evaluation_points(evaluation)
    if points:
        methods = [(p["recipe"], p["method"]) for p in points if p["kl"] > 0]
        apart = len(set(methods)) == len(methods) and all(m in plots.COLOURS for _, m in methods)
        yield Figure(
            name="quality_against_bytes", part=QUALITY, caption=AGAINST_BYTES,
            draw=partial(quality_against_bytes, points, styles=None if apart else styles),
        )  # fmt: skip
    histograms = {n: m["kl_histogram"] for n, m in models.items() if "kl_histogram" in m}
    if histograms:
        yield Figure(
            name="kl_histogram", part=QUALITY, caption=HISTOGRAM,
            draw=partial(kl_histogram, histograms, styles=styles),
        )  # fmt: skip
    positions = {n: m["positions"] for n, m in models.items() if m.get("positions")}
    for key, words, scale, caption in BY_POSITION:
        held = {n: rows for n, rows in positions.items() if any(key in row for row in rows)}
        if held:
            yield Figure(
                name=f"{key}_by_position", part=QUALITY, caption=caption,
                draw=partial(by_position, held, key, words, scale=scale, styles=styles),
            )  # fmt: skip
    categories = {
        name: {kind: row["kl_mean"] for kind, row in m.get("categories", {}).items() if "kl_mean" in row}
        for name, m in models.items()
    }  # fmt: skip
    categories = {name: rows for name, rows in categories.items() if rows}
    if categories:
        yield Figure(
            name="kl_by_category", part=QUALITY, caption="Divergence by category of text, with intervals.",
            draw=partial(by_category, categories, "mean KL (nats per token)", styles=styles),
        )  # fmt: skip


def evaluation_points(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the points of quality against bytes: every model with both, and the reference."""
    points = []
    for name, model in evaluation["models"].items():
        if model.get("bytes") and "kl_mean" in model["summary"]:
            method = plots.method_in(name) or name
            kl = model["summary"]["kl_mean"]
            points.append(_point(name, model.get("recipe", ""), method, model["bytes"], kl))
    reference = evaluation["reference"]
    if points and reference.get("bytes"):
        words = plots.short(str(reference.get("name", "reference")), 24)
        points.append(_point(words, "", "float", reference["bytes"], 0.0))
    return points
