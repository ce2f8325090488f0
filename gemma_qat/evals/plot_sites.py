"""Figures of what a grid does: bits and bytes, error over the layers, use of the codes, load of the experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gemma_qat.evals.plots import (
    COLOURS,
    HEIGHT,
    INK,
    SEQUENCE,
    SPARE,
    WIDTH,
    Number,
    Style,
    figure_of,
    grid,
    legend_above,
    line_styles,
    short,
)


def bits_per_site(rows: Sequence[Mapping[str, Any]], form: str = "svg") -> bytes:
    """Returns bars of stored bits per weight for each class of sites, beside its share of the
    bytes.

    Each row has site, format, bits and share (0 to 1); rows are drawn top down in the order given.
    Units: bits per weight, scales included; percent of all stored bytes.
    Raises: ValueError for a form other than 'svg' and 'png'.
    """
    names = [short(f"{row['site']} ({row['format']})", 30) for row in rows]
    formats = list(dict.fromkeys(row["format"] for row in rows))
    palette = [*COLOURS.values(), *SPARE]
    # Float formats keep the float colour, so that what was left alone is grey in every figure.
    quantized = [name for name in formats if "float" not in name]
    colour = {name: palette[(quantized.index(name) + 3) % len(palette)] for name in quantized}
    colours = [colour.get(row["format"], COLOURS["float"]) for row in rows]

    def draw(axes: Any) -> None:
        bits, share = axes
        _bars(bits, [row["bits"] for row in rows], colours, "{:.2f}", "bits/weight")
        _bars(share, [100 * row["share"] for row in rows], colours, "{:.1f}%", "bytes (%)")
        bits.set_yticks(range(len(names)), names)
        share.tick_params(labelleft=False)
        bits.invert_yaxis()

    return figure_of(draw, form, (WIDTH, max(1.6, 0.26 * len(rows) + 0.7)), panels=2)


def error_per_layer(
    lines: Mapping[str, Sequence[Sequence[Number]]],
    form: str = "svg",
    *,
    ylabel: str,
    top: float | None = None,
) -> bytes:
    """Returns a figure of a value against the layer, one line per class of sites.

    Units: each line is a sequence of (layer, value); `top` is where the axis ends, so that figures compare.
    Raises: ValueError for a form other than 'svg' and 'png'.
    """
    from matplotlib.ticker import MaxNLocator

    def draw(axes: Any) -> None:
        for number, (label, line) in enumerate(lines.items()):
            layers, values = np.asarray(line, dtype=np.float64).reshape(-1, 2).T
            axes.plot(
                layers, values, label=label, color=SEQUENCE[number % len(SEQUENCE)], marker="o",
                markersize=3, linestyle=("-", "--", ":")[number // len(SEQUENCE) % 3],
            )  # fmt: skip
        axes.set(xlabel="layer", ylabel=ylabel)
        axes.set_ylim(0, top or None)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        grid(axes)
        legend_above(axes, lines)

    return figure_of(draw, form, entries=lines)


def code_use(
    use: Mapping[str, Mapping[str, Mapping[str, Any]]],
    form: str = "svg",
    *,
    styles: Mapping[str, Style] | None = None,
) -> bytes:
    """Returns how often each code is used, a panel per format: its first label filled, the others as outlines.

    `use` is {LABEL: {FORMAT: {"codes", "counts"}}}. Units: percent of a format's weights.
    Raises: ValueError for a form other than 'svg' and 'png'.
    """
    formats = list(dict.fromkeys(name for per in use.values() for name in per))
    chosen = styles or dict(zip(use, line_styles(use), strict=True))
    columns = 2 if len(formats) > 1 else 1
    rows = -(-len(formats) // columns) or 1

    def draw(axes: Any) -> None:
        panels = np.atleast_1d(axes).ravel()
        for panel, name in zip(panels, formats, strict=False):
            having = [label for label, per in use.items() if name in per]
            for label in having:
                filled = label == having[0]
                _outline(panel, use[label][name], chosen[label], filled=filled, label=label)
            panel.set_title(name, loc="left", fontsize=9.5)
            panel.set_ylim(bottom=0)
            grid(panel)
        for panel in panels[len(formats) :]:
            panel.set_visible(False)
        panels[0].figure.supxlabel("code", fontsize=9.5)
        panels[0].figure.supylabel("weights (%)", fontsize=9.5)
        if len(use) > 1:
            from matplotlib.lines import Line2D

            legend_above(panels[0], use, [Line2D([], [], **chosen[label]) for label in use])

    size = (WIDTH, max(HEIGHT, 1.5 * rows + 0.3))
    entries = use if len(use) > 1 else ()
    return figure_of(draw, form, size, columns, rows=rows, sharey=False, entries=entries)


def expert_load(loads: Mapping[str, Sequence[Number]], form: str = "svg") -> bytes:
    """Returns the share of each layer's experts, sorted from the most used: one line per layer, the even share dotted.

    `loads` is {LAYER: [count or share of each expert]}. Units: times the even share (1 for all when even).
    Raises: ValueError for a form other than 'svg' and 'png'.
    """
    named = len(loads) <= 8

    def draw(axes: Any) -> None:
        from matplotlib.ticker import MaxNLocator

        for number, (label, load) in enumerate(loads.items()):
            counts = np.sort(np.asarray(load, dtype=np.float64))[::-1]
            even = counts * counts.size / max(counts.sum(), 1e-30)
            colour = SEQUENCE[number % len(SEQUENCE)] if named else SEQUENCE[0]
            axes.step(
                np.arange(1, counts.size + 1), even, where="mid", label=label, color=colour,
                alpha=1.0 if named else 0.45, linewidth=1.7 if named else 1.0,
            )  # fmt: skip
        axes.axhline(1.0, color=INK, linestyle=":", linewidth=1)
        axes.set(xlabel="experts, most used first", ylabel="load (times the even share)")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        grid(axes)
        if named:
            legend_above(axes, loads)

    return figure_of(draw, form, entries=loads if named else ())


def _outline(axes: Any, use: Mapping[str, Any], style: Style, *, filled: bool, label: str) -> None:
    codes = np.asarray(use["codes"], dtype=np.float64)
    order = np.argsort(codes)
    codes, counts = codes[order], np.asarray(use["counts"], dtype=np.float64)[order]
    middles = (codes[1:] + codes[:-1]) / 2
    half = middles[0] - codes[0] if codes.size > 1 else 0.5
    edges = np.concatenate([[codes[0] - half], middles, [codes[-1] + half]])
    percent = 100 * counts / max(counts.sum(), 1.0)
    if filled:
        axes.stairs(percent, edges, fill=True, color=style["color"], alpha=0.35)
    axes.stairs(percent, edges, label=label, linewidth=1.2, **style)


def _bars(
    axes: Any, lengths: list[float | int], colours: list[str], words: str, xlabel: str
) -> None:
    bars = axes.barh(range(len(lengths)), lengths, color=colours, height=0.66)
    axes.bar_label(bars, [words.format(length) for length in lengths], padding=3, fontsize=8.5)
    axes.set_xlim(0, 1.3 * max([*lengths, 1e-9]))
    axes.set(xlabel=xlabel)
    axes.tick_params(left=False)
    axes.spines["left"].set_visible(False)
