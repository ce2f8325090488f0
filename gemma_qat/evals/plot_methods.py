"""The figure of a comparison: a column per recipe, a line per method, PTQ above and what was trained below.

Three rows of panels: mean KL, loss gap (both logarithmic), and of the trained methods the share won back of the best
PTQ. All columns have the same lines, so that a method is read across. A loss gap at or below zero has no place on a
logarithmic axis: its value is written at the left edge, which is where a model better than the reference would be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gemma_qat.evals.plots import COLOURS, INK, figure_of, grid, legend_above, plain_decades

Group = Mapping[str, Any]

_KINDS = {
    "ptq": ("without training", COLOURS["rtn"], "s"),
    "trained": ("trained on the grid", COLOURS["qat"], "o"),
    "control": ("trained on in float", COLOURS["float"], "D"),
}
_SHARES = {"kl_mean": ("KL", COLOURS["qat"], "o"), "loss_gap": ("loss gap", COLOURS["qat_ce"], "v")}
_SHOWN = (-60.0, 108.0)
"""Percent: what lies outside is written at the edge."""
_LINE, _COLUMN = 0.185, 2.35
"""Inches of a line and of a column."""


def methods_by_recipe(figures: Mapping[str, Any], form: str = "svg") -> bytes:
    """Returns the figure of a sweep's figures (`sweep/figures.py` says what they hold).

    Units: nats per token; percent. Recipes with one group alone, such as a speed baseline, have no column.
    Raises: ValueError for a form other than 'svg' and 'png'.
    """
    columns = _columns(figures["groups"])
    lines = _lines(columns)
    trained = [line for line in lines if line[0] == "trained"]
    entries = [words for words, *_ in _KINDS.values()]
    entries += [f"{words} won back" for words, *_ in _SHARES.values()]
    heights = [len(lines) + 2.2, len(lines) + 2.2, len(trained) + 2.2]
    size = (1.6 + _COLUMN * max(len(columns), 2), _LINE * sum(heights) + 0.5)

    def draw(axes: Any) -> None:
        import numpy as np

        panels = np.asarray(axes).reshape(3, -1)
        figure = panels[0, 0].figure
        panels[0, 0].get_gridspec().set_height_ratios(heights)
        for column, (recipe, groups) in enumerate(columns.items()):
            panels[0, column].set_title(recipe, loc="left", fontsize=10.5, fontweight="bold")
            for row, key in enumerate(("kl_mean", "loss_gap")):
                _draw_values(panels[row, column], groups, lines, key)
            _draw_shares(panels[2, column], groups, trained, figures)
        for row, shown in enumerate((lines, lines, trained)):
            for column, one in enumerate(panels[row]):
                one.set_ylim(len(shown) - 0.4, -0.6)
                one.set_yticks(
                    range(len(shown)), [method for _, method in shown] if column == 0 else []
                )
                one.tick_params(left=False)
                one.spines["left"].set_visible(False)
        for row, label in enumerate(("mean KL (nats)", "loss gap (nats)", "of the best PTQ's (%)")):
            for one in panels[row, : len(columns)]:
                one.set_xlabel(label)
        for one in panels[:, len(columns) :].ravel():
            one.set_visible(False)
        legend_above(panels[0, 0], entries, _handles())
        figure.align_ylabels()

    return figure_of(
        draw, form, size, max(len(columns), 2), rows=3, sharey=False, entries=entries[:3]
    )


def _columns(groups: Mapping[str, Group]) -> dict[str, dict[tuple[str, str], tuple[str, Group]]]:
    """Returns {recipe: {(kind, method): (name, group)}}, the float control of a recipe's among them."""
    found: dict[str, dict[tuple[str, str], tuple[str, Group]]] = {}
    for name, group in groups.items():
        if group["recipe"] != "float":
            own = found.setdefault(group["recipe"], {})
            own[group["kind"], group["method"]] = (name, group)
            if "control" in group:
                own["control", "float_control"] = (group["control"], groups[group["control"]])
    return {recipe: own for recipe, own in found.items() if sum(k[0] != "control" for k in own) > 1}


def _lines(columns: Mapping[str, Mapping[tuple[str, str], Any]]) -> list[tuple[str, str]]:
    """Returns (kind, method) of every line, top down."""
    every = list(dict.fromkeys(line for own in columns.values() for line in own))
    return sorted(every, key=lambda line: list(_KINDS).index(line[0]))


def _draw_values(
    axes: Any,
    groups: Mapping[tuple[str, str], tuple[str, Group]],
    lines: Sequence[tuple[str, str]],
    key: str,
) -> None:
    shown = [
        (place, line[0], groups[line][1]["summary"][key])
        for place, line in enumerate(lines)
        if line in groups
    ]
    inside = [one for _, _, one in shown if one["value"] > 0]
    least = min((one["value"] for one in inside), default=1.0) / 1.6
    most = max((one["high"] for one in inside), default=10.0) * 1.25
    axes.set_xscale("log")
    axes.set_xlim(least, most)
    for place, kind, one in shown:
        _, colour, marker = _KINDS[kind]
        if one["value"] <= 0:
            axes.text(least * (most / least) ** 0.02, place, f"◂ {one['value']:.3f}".replace("-", "−"),
                      color=colour, va="center", fontsize=8)  # fmt: skip
            continue
        axes.plot(
            [max(one["low"], least), one["high"]], [place, place], color=colour, linewidth=1.4
        )
        axes.plot([one["value"]], [place], marker=marker, color=colour, markersize=4.5)
    best = min((one["value"] for _, kind, one in shown if kind == "ptq"), default=None)
    if best is not None and best > 0:
        axes.axvline(best, color=_KINDS["ptq"][1], linewidth=0.9, linestyle=":")
    plain_decades(axes.xaxis)
    axes.tick_params(axis="x", labelsize=8)
    grid(axes, "x")
    _divide(axes, lines)


def _draw_shares(
    axes: Any,
    groups: Mapping[tuple[str, str], tuple[str, Group]],
    lines: Sequence[tuple[str, str]],
    figures: Mapping[str, Any],
) -> None:
    least, most = _SHOWN
    axes.set_xlim(least, most)
    axes.axvline(0, color=_KINDS["ptq"][1], linewidth=0.9, linestyle=":")
    for place, line in enumerate(lines):
        if line not in groups:
            continue
        against = figures["against_best"].get(groups[line][0], {})
        for (key, (_, colour, marker)), shift in zip(_SHARES.items(), (-0.16, 0.16), strict=True):
            one = against.get(key, {}).get("recovered", {"value": None})
            at = place + shift
            if one["value"] is None:
                continue
            if not least <= one["value"] <= most:
                below = one["value"] < least
                said = f"◂ {one['value']:.0f}" if below else f"{one['value']:.0f} ▸"
                axes.text(least + 3 if below else most, at, said.replace("-", "−"), color=colour,
                          ha="left" if below else "right", va="center", fontsize=7)  # fmt: skip
                continue
            axes.plot(
                [max(one["low"], least), min(one["high"], most)],
                [at, at],
                color=colour,
                linewidth=1.4,
            )
            axes.plot([one["value"]], [at], marker=marker, color=colour, markersize=4)
    axes.set_xticks([-50, 0, 50, 100], ["−50", "0", "50", "100"])
    axes.tick_params(axis="x", labelsize=8)
    grid(axes, "x")


def _divide(axes: Any, lines: Sequence[tuple[str, str]]) -> None:
    for place in range(1, len(lines)):
        if lines[place][0] != lines[place - 1][0]:
            axes.axhline(place - 0.5, color=INK, linewidth=0.6, alpha=0.35)


def _handles() -> list[Any]:
    from matplotlib.lines import Line2D

    return [
        Line2D([], [], color=colour, marker=marker, markersize=4.5, linewidth=1.4)
        for _, colour, marker in (*_KINDS.values(), *_SHARES.values())
    ]
