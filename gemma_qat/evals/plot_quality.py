"""Figures of how far models are from their reference: against bytes, token by token, by position, by category."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from gemma_qat.evals.plots import (
    COLOURS,
    HEIGHT,
    INK,
    SEQUENCE,
    WIDTH,
    Style,
    figure_of,
    grid,
    legend_above,
    line_styles,
    method_title,
    plain_decades,
)
from gemma_qat.evals.summary import kl_counts

Point = Mapping[str, Any]
_MARKERS = "osD^vP"


def quality_against_bytes(
    points: Sequence[Point], form: str = "svg", *, styles: Mapping[str, Style] | None = None
) -> bytes:
    """Returns a figure of KL to the float model against stored megabytes, with error bars and the Pareto front.

    Each point has label, recipe, method, bytes, kl, low and high. Colour is the method, the marker
    is the recipe; with `styles` the colour is the label's, and the legend names labels.
    Units: bytes; nats per token. A point whose kl is 0 (the reference) has no place on a
    logarithmic axis: it is a vertical line at its bytes. Recipes of about equal bytes are set
    2 % of the axis apart, so that their points can be told.
    Raises: ValueError for a form other than 'svg' and 'png'.
    """
    measured = [point for point in points if point["kl"] > 0]
    recipes = list(dict.fromkeys(point["recipe"] for point in measured))
    key = "label" if styles else "method"
    names = list(dict.fromkeys(point[key] for point in measured))
    entries = [method_title(name) for name in names]
    entries += recipes if len(recipes) > 1 or not styles else []

    def draw(axes: Any) -> None:
        right = 1.06 * max((point["bytes"] / 1e6 for point in points), default=1.0)
        shifts = _shifts(measured, right)
        colours = _colours(names, styles)
        _draw_front(axes, measured, shifts)
        for point, shift in zip(measured, shifts, strict=True):
            marker = _MARKERS[recipes.index(point["recipe"]) % 6]
            _draw_point(axes, point, marker, shift, colours[point[key]])
        for point in points:
            if point["kl"] <= 0:
                _draw_reference(axes, point)
        if measured:
            axes.set_yscale("log")
            plain_decades(axes.yaxis)
        axes.set_xlim(0, right)
        axes.set(xlabel="stored size (megabytes)", ylabel="mean KL (nats per token)")
        grid(axes)
        handles = _handles(names, colours, recipes)
        legend_above(axes, entries, handles[: len(entries)])

    return figure_of(draw, form, entries=entries)


def pareto_front(points: Sequence[Point]) -> list[int]:
    """Returns the places of the points that no other betters in both bytes and KL, by bytes.

    Of points with equal bytes the one with the least KL is on the front.
    """
    order = sorted(
        range(len(points)), key=lambda place: (points[place]["bytes"], points[place]["kl"])
    )
    front: list[int] = []
    for place in order:
        if not front or points[place]["kl"] < points[front[-1]]["kl"]:
            front.append(place)
    return front


def kl_histogram(
    samples: Mapping[str, np.ndarray | Mapping[str, Any]],
    form: str = "svg",
    *,
    styles: Mapping[str, Style] | None = None,
) -> bytes:
    """Returns a log-x histogram of per-token KL, one outline per label.

    Each sample is an array of nats, or a histogram {"edges", "counts"} as `kl_counts` makes it.
    Units: percent of the label's tokens per bin.
    Raises: ValueError for a form other than 'svg' and 'png'.
    """
    histograms = {
        label: kl_counts(sample) if isinstance(sample, np.ndarray) else sample
        for label, sample in samples.items()
    }
    chosen = styles or dict(zip(histograms, line_styles(histograms), strict=True))

    def draw(axes: Any) -> None:
        for label, bins in histograms.items():
            style = chosen[label]
            percent = 100 * np.asarray(bins["counts"]) / max(1, sum(bins["counts"]))
            axes.stairs(percent, bins["edges"], label=method_title(label), **style)
            axes.stairs(percent, bins["edges"], fill=True, color=style["color"], alpha=0.1)
        axes.set_xscale("log")
        axes.set_xlim(*_occupied(histograms.values()))
        axes.set_ylim(bottom=0)
        axes.set(xlabel="KL of one token (nats)", ylabel="tokens (%)")
        grid(axes)
        legend_above(axes, histograms)

    return figure_of(draw, form, entries=histograms)


def by_position(
    positions: Mapping[str, Sequence[Mapping[str, Any]]],
    key: str,
    ylabel: str,
    form: str = "svg",
    *,
    scale: float = 1.0,
    styles: Mapping[str, Style] | None = None,
) -> bytes:
    """Returns a figure of one statistic against the place in a document, one line and band per label.

    Units: each row covers positions `from` up to `to`, and is drawn across them; values times `scale`.
    Raises: ValueError for a form other than 'svg' and 'png'.
    """
    chosen = styles or dict(zip(positions, line_styles(positions), strict=True))

    def draw(axes: Any) -> None:
        for label, rows in positions.items():
            shown = [row for row in rows if key in row]
            middle = [(row["from"] + row["to"] - 1) / 2 for row in shown]
            value, low, high = (
                [scale * _part(row[key], part) for row in shown]
                for part in ("value", "low", "high")
            )
            axes.plot(middle, value, label=method_title(label), marker="o", markersize=3, **chosen[label])  # fmt: skip
            axes.fill_between(middle, low, high, color=chosen[label]["color"], alpha=0.13, linewidth=0)  # fmt: skip
        axes.set(xlabel="position in the row (tokens)", ylabel=ylabel)
        axes.set_xlim(left=0)
        if _far_apart(
            _part(row[key], "low") for rows in positions.values() for row in rows if key in row
        ):
            axes.set_yscale("log")
            plain_decades(axes.yaxis)
        grid(axes)
        legend_above(axes, positions)

    return figure_of(draw, form, entries=positions)


def by_category(
    categories: Mapping[str, Mapping[str, Any]],
    xlabel: str,
    form: str = "svg",
    *,
    styles: Mapping[str, Style] | None = None,
) -> bytes:
    """Returns a point with its interval for each label in each category of text, categories downwards.

    `categories` is {LABEL: {CATEGORY: estimate}}.
    Units: those of the estimates, from zero, or on a logarithmic axis where they are far apart.
    Raises: ValueError for a form other than 'svg' and 'png'.
    """
    names = list(dict.fromkeys(name for rows in categories.values() for name in rows))
    chosen = styles or dict(zip(categories, line_styles(categories), strict=True))

    def draw(axes: Any) -> None:
        step = min(0.2, 0.7 / max(1, len(categories)))
        for number, (label, rows) in enumerate(categories.items()):
            shift = step * (number - (len(categories) - 1) / 2)
            places = [names.index(name) + shift for name in rows]
            value, low, high = (
                [_part(row, part) for row in rows.values()] for part in ("value", "low", "high")
            )
            ends = [np.subtract(value, low).clip(0), np.subtract(high, value).clip(0)]
            axes.errorbar(
                value, places, xerr=ends, fmt=_marker(chosen[label]), markersize=5, capsize=2, elinewidth=1.2,
                color=chosen[label]["color"], label=method_title(label),
            )  # fmt: skip
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(max(1, len(names)) - 0.5, -0.5)
        if _far_apart(_part(row, "low") for rows in categories.values() for row in rows.values()):
            axes.set_xscale("log")
            plain_decades(axes.xaxis)
        else:
            axes.set_xlim(left=0)
        axes.set(xlabel=xlabel)
        grid(axes, "x")
        legend_above(axes, categories)

    tall = max(1.4, (0.28 + 0.11 * len(categories)) * len(names) + 0.6)
    return figure_of(draw, form, (WIDTH, min(tall, 4 * HEIGHT)), entries=categories)


def _far_apart(values: Iterable[float]) -> bool:
    """Whether values, all above zero, differ so much that the small ones would lie on a linear axis's end."""
    found = list(values)
    return bool(found) and min(found) > 0 and max(found) > 20 * min(found)


def _part(estimate: Any, part: str) -> float:
    """An end of an estimate; where there is no interval, its value."""
    if not isinstance(estimate, Mapping):
        return float(estimate)
    found = estimate.get(part)
    return float(estimate["value"] if found is None else found)


def _marker(style: Style) -> str:
    """The marker that stands for a dash where there is no line."""
    return {"-": "o", "--": "s", ":": "D", "-.": "^"}.get(style.get("linestyle", "-"), "o")


def _colours(names: Sequence[str], styles: Mapping[str, Style] | None) -> dict[str, str]:
    if styles:
        return {name: styles[name]["color"] for name in names}
    other = [name for name in names if name not in COLOURS]
    spare = {name: SEQUENCE[number % len(SEQUENCE)] for number, name in enumerate(other)}
    return {**spare, **{name: COLOURS[name] for name in names if name in COLOURS}}


def _shifts(points: Sequence[Point], right: float) -> list[float]:
    """Returns megabytes to set each point aside by: recipes of about equal bytes move apart."""
    columns: dict[int, list[str]] = {}
    placed = [(round(25 * point["bytes"] / 1e6 / right), point["recipe"]) for point in points]
    for column, recipe in dict.fromkeys(placed):
        columns.setdefault(column, []).append(recipe)
    return [
        right / 50 * (columns[column].index(recipe) - (len(columns[column]) - 1) / 2)
        for column, recipe in placed
    ]


def _draw_front(axes: Any, points: Sequence[Point], shifts: Sequence[float]) -> None:
    """Joins what nothing betters by a line of steps: to its right and above, something is as good for less."""
    front = pareto_front(points)
    if front:
        x = [points[place]["bytes"] / 1e6 + shifts[place] for place in front]
        y = [points[place]["kl"] for place in front]
        right = 1.06 * max(point["bytes"] / 1e6 for point in points)
        axes.plot(
            [*x, max(right, x[-1])], [*y, y[-1]], drawstyle="steps-post", color=INK, alpha=0.45,
            linewidth=1.1, zorder=1,
        )  # fmt: skip


def _draw_point(axes: Any, point: Point, marker: str, shift: float, colour: str) -> None:
    value = point["kl"]
    low, high = (point.get(end) or value for end in ("low", "high"))
    # An end at or below zero is off a logarithmic axis: the bar then spans a decade.
    low = low if low > 0 else value / 10
    axes.errorbar(
        [point["bytes"] / 1e6 + shift],
        [value],
        yerr=[[max(0.0, value - low)], [max(0.0, high - value)]],
        fmt=marker,
        markersize=6,
        capsize=2.5,
        elinewidth=1.2,
        color=colour,
    )


def _draw_reference(axes: Any, point: Point) -> None:
    place = point["bytes"] / 1e6
    axes.axvline(place, color=COLOURS["float"], linestyle="--", linewidth=1.2)
    axes.annotate(
        point["label"],
        (place, 0.97),
        xycoords=("data", "axes fraction"),
        xytext=(-4, 0),
        textcoords="offset points",
        rotation=90,
        ha="right",
        va="top",
    )


def _handles(names: Sequence[str], colours: Mapping[str, str], recipes: Sequence[str]) -> list[Any]:
    """Marks of a legend: a colour for each name, then a hollow marker for each recipe."""
    from matplotlib.lines import Line2D

    return [Line2D([], [], color=colours[name], marker="s", linestyle="") for name in names] + [
        Line2D([], [], color=INK, marker=_MARKERS[index % 6], linestyle="", fillstyle="none")
        for index, _ in enumerate(recipes)
    ]


def _occupied(histograms: Iterable[Mapping[str, Any]]) -> tuple[float, float]:
    """Returns the range of the bins that hold anything, so that empty decades are not drawn."""
    low, high = math.inf, -math.inf
    for bins in histograms:
        filled = np.flatnonzero(bins["counts"])
        if filled.size:
            low = min(low, bins["edges"][filled[0]])
            high = max(high, bins["edges"][filled[-1] + 1])
    return (low, high) if low < high else (1e-9, 1.0)
