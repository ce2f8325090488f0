"""The figures of the report, drawn by matplotlib without a display and returned as bytes.

One colour per method in every figure, taken from a palette that stays apart for the common colour-blind eyes
and reads on white and on near-black. Everything that is not data (text, ticks, frame) is drawn in one ink, so
`inline_svg` can hand that ink to the page's text colour and a figure follows the theme of its page.

Bytes are reproducible for one version of matplotlib (no dates, no random names), which is imported only to draw.
Source of the palette: Okabe and Ito, "Color Universal Design" (2008), blue lightened for dark backgrounds.
"""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from gemma_qat.evals.summary import kl_counts

INK = "#24272e"
COLOURS = {
    "float": "#8a8f98",
    "rtn": "#d55e00",
    "mse": "#e69f00",
    "qat": "#2f86d8",
    "qat_ce": "#009e73",
    "float_control": "#cc79a7",
}
TITLES = {
    "float": "float",
    "bigram": "bigram counts",
    "rtn": "round to nearest",
    "mse": "least squares scales",
    "qat": "QAT",
    "qat_ce": "QAT, cross entropy",
    "float_control": "float control",
}
_SPARE = ("#56b4e9", "#b8a100", "#7c6fd0", "#a0522d")
_DASHES = ("-", "--", ":", "-.")
_MARKERS = "osD^vP"
_SIZE = (5.4, 3.5)
_STYLE: dict[Any, Any] = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.linewidth": 0.8,
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.7,
    "svg.fonttype": "path",
    "svg.hashsalt": "gemma_qat",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def method_title(method: str) -> str:
    """Returns the words for a method's name, or the name itself when it has none."""
    return TITLES.get(method, method)


def loss_curves(
    curves: Mapping[str, Sequence[Sequence[Any]]],
    ylabel: str,
    logx: bool = False,
    form: str = "svg",
) -> bytes:
    """Returns a figure of values against training steps, one line per label.

    Units: each curve is a sequence of (step, value); with `logx` the step axis is logarithmic above
    1 and keeps step 0.
    Raises: ValueError for a form other than 'svg' and 'png'.
    """

    def draw(axes: Any) -> None:
        for (label, curve), style in zip(curves.items(), _line_styles(curves), strict=True):
            steps, values = np.asarray(curve, dtype=np.float64).reshape(-1, 2).T
            axes.plot(steps, values, label=method_title(label), **style)
        if logx:
            axes.set_xscale("symlog", linthresh=1)
        axes.set(xlabel="training step", ylabel=ylabel)
        _legend(axes, len(curves))

    return figure_of(draw, form)


def quality_against_bytes(points: Sequence[Mapping[str, Any]], form: str = "svg") -> bytes:
    """Returns a figure of KL to the float model against stored megabytes, with error bars.

    Each point has label, recipe, method, bytes, kl, low and high. Colour is the method, the marker
    is the recipe.
    Units: bytes; nats per token. A point whose kl is 0 (the reference) has no place on a
    logarithmic axis: it is a vertical line at its bytes. Recipes of about equal bytes are set
    2 % of the axis apart, so that their points can be told.
    Raises: ValueError for a form other than 'svg' and 'png'.
    """
    measured = [point for point in points if point["kl"] > 0]

    def draw(axes: Any) -> None:
        recipes = list(dict.fromkeys(point["recipe"] for point in measured))
        right = 1.06 * max((point["bytes"] / 1e6 for point in points), default=1.0)
        for point, shift in zip(measured, _shifts(measured, right), strict=True):
            _draw_point(axes, point, _MARKERS[recipes.index(point["recipe"]) % 6], shift)
        for point in points:
            if point["kl"] <= 0:
                _draw_reference(axes, point)
        if measured:
            axes.set_yscale("log")
            _plain_decades(axes.yaxis)
        axes.set_xlim(0, right)
        axes.set(xlabel="stored size (megabytes)", ylabel="mean KL to float (nats per token)")
        axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.7)
        _point_legend(axes, measured, recipes)

    return figure_of(draw, form)


def kl_histogram(samples: Mapping[str, np.ndarray | Mapping[str, Any]], form: str = "svg") -> bytes:
    """Returns a log-x histogram of per-token KL, one outline per label.

    Each sample is an array of nats, or a histogram {"edges", "counts"} as `kl_counts` makes it.
    Units: percent of the label's tokens per bin.
    Raises: ValueError for a form other than 'svg' and 'png'.
    """
    histograms = {
        label: kl_counts(sample) if isinstance(sample, np.ndarray) else sample
        for label, sample in samples.items()
    }

    def draw(axes: Any) -> None:
        for (label, bins), style in zip(histograms.items(), _line_styles(histograms), strict=True):
            percent = 100 * np.asarray(bins["counts"]) / max(1, sum(bins["counts"]))
            axes.stairs(percent, bins["edges"], label=method_title(label), **style)
            axes.stairs(percent, bins["edges"], fill=True, color=style["color"], alpha=0.12)
        axes.set_xscale("log")
        axes.set_xlim(*_occupied(histograms.values()))
        axes.set_ylim(bottom=0)
        axes.set(xlabel="KL(float, model) of one token (nats)", ylabel="tokens (%)")
        _legend(axes, len(histograms))

    return figure_of(draw, form)


def bits_per_site(rows: Sequence[Mapping[str, Any]], form: str = "svg") -> bytes:
    """Returns bars of stored bits per weight for each class of sites, beside its share of the
    bytes.

    Each row has site, format, bits and share (0 to 1); rows are drawn top down in the order given.
    Units: bits per weight, scales included; percent of all stored bytes.
    Raises: ValueError for a form other than 'svg' and 'png'.
    """
    names = [f"{row['site']} ({row['format']})" for row in rows]
    formats = list(dict.fromkeys(row["format"] for row in rows))
    palette = [*COLOURS.values(), *_SPARE]
    # Float formats keep the float colour, so that what was left alone is grey in every figure.
    quantized = [name for name in formats if "float" not in name]
    colour = {name: palette[(quantized.index(name) + 3) % len(palette)] for name in quantized}
    colours = [colour.get(row["format"], COLOURS["float"]) for row in rows]

    def draw(axes: Any) -> None:
        bits, share = axes
        _bars(bits, [row["bits"] for row in rows], colours, "{:.2f}", "bits per weight")
        _bars(share, [100 * row["share"] for row in rows], colours, "{:.1f}%", "share of bytes (%)")
        bits.set_yticks(range(len(names)), names)
        share.tick_params(labelleft=False)
        bits.invert_yaxis()

    height = max(1.6, 0.34 * len(rows) + 0.8)
    return figure_of(draw, form, size=(_SIZE[0], height), panels=2)


def inline_svg(svg: bytes, prefix: str, title: str) -> str:
    """Returns an SVG figure as an element for an HTML page, drawn in the page's text colour.

    `prefix` keeps its element names apart from those of other figures in the page; `title` is read
    to those who cannot see it. The result names no address at all: HTML needs no namespace
    declarations.
    """
    text = svg.decode()
    body = text[text.index("<svg") :]
    body = body[body.index(">") + 1 :]
    view = re.search(r'viewBox="([^"]+)"', text)
    body = re.sub(
        r"<defs>\s*<style.*?</style>\s*</defs>|<metadata>.*?</metadata>", "", body, flags=re.S
    )
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", body)
    body = re.sub(r"\s*\n\s*", " ", body.replace(INK, "currentColor"))
    box = view.group(1) if view else "0 0 1 1"
    return f'<svg viewBox="{box}" role="img" aria-label="{escape(title)}">{body.strip()}'


def figure_of(
    draw: Callable[[Any], None], form: str, size: tuple[float, float] = _SIZE, panels: int = 1
) -> bytes:
    """Returns a figure in the style of all; `draw` fills its axes."""
    if form not in ("svg", "png"):
        raise ValueError(f"plot form {form!r}: expected 'svg' or 'png'")
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure.subplots(1, panels, sharey=panels > 1))
        out = io.BytesIO()
        if form == "png":
            figure.savefig(out, format=form, dpi=160, facecolor="white")
        else:
            # The default metadata holds the date and addresses of vocabularies.
            nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
            figure.savefig(out, format=form, transparent=True, metadata=nothing)
    return out.getvalue()


def _line_styles(labels: Iterable[str]) -> list[dict[str, Any]]:
    """Returns a colour and a dash for every label; labels of one method share the colour."""
    styles, uses = [], dict.fromkeys(COLOURS.values(), 0)
    spare = 0
    for label in labels:
        method = _method_in(label)
        colour = COLOURS[method] if method else _SPARE[spare % len(_SPARE)]
        spare += method is None
        styles.append({"color": colour, "linestyle": _DASHES[uses.get(colour, 0) % 4]})
        uses[colour] = uses.get(colour, 0) + 1
    return styles


def _method_in(label: str) -> str | None:
    """Returns the method a label names, by its name or its title; the longest wins (qat_ce over
    qat)."""
    named = {name: method for method in COLOURS for name in (method, method_title(method).lower())}
    words = re.sub(r"[^a-z0-9_, ]", " ", label.lower())
    found = [name for name in named if re.search(rf"(?<![a-z0-9_]){name}(?![a-z0-9_])", words)]
    return named[max(found, key=len)] if found else None


def _legend(axes: Any, entries: int) -> None:
    if entries:
        axes.legend(handlelength=1.8)


def _shifts(points: Sequence[Mapping[str, Any]], right: float) -> list[float]:
    """Returns megabytes to set each point aside by: recipes of about equal bytes move apart."""
    columns: dict[int, list[str]] = {}
    placed = [(round(25 * point["bytes"] / 1e6 / right), point["recipe"]) for point in points]
    for column, recipe in dict.fromkeys(placed):
        columns.setdefault(column, []).append(recipe)
    return [
        right / 50 * (columns[column].index(recipe) - (len(columns[column]) - 1) / 2)
        for column, recipe in placed
    ]


def _draw_point(axes: Any, point: Mapping[str, Any], marker: str, shift: float) -> None:
    value = point["kl"]
    # An end at or below zero is off a logarithmic axis: the bar then spans a decade.
    low = point["low"] if point["low"] > 0 else value / 10
    axes.errorbar(
        [point["bytes"] / 1e6 + shift],
        [value],
        yerr=[[max(0.0, value - low)], [max(0.0, point["high"] - value)]],
        fmt=marker,
        markersize=6,
        capsize=2.5,
        elinewidth=1.2,
        color=COLOURS.get(point["method"], _SPARE[0]),
    )


def _draw_reference(axes: Any, point: Mapping[str, Any]) -> None:
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


def _point_legend(axes: Any, points: Sequence[Mapping[str, Any]], recipes: list[str]) -> None:
    """Adds a row of methods (colours) above a row of recipes (markers)."""
    from matplotlib.lines import Line2D

    blank = (Line2D([], [], linestyle=""), "")
    methods = [
        (Line2D([], [], color=COLOURS.get(name, _SPARE[0]), marker="s", linestyle=""), name)
        for name in dict.fromkeys(point["method"] for point in points)
    ]
    markers = [
        (Line2D([], [], color=INK, marker=_MARKERS[index % 6], ls="", fillstyle="none"), name)
        for index, name in enumerate(recipes)
    ]
    # matplotlib fills a legend column by column: one method and one recipe to each.
    pairs = itertools.zip_longest(methods, markers, fillvalue=blank)
    entries = [entry for pair in pairs for entry in pair]
    if entries:
        axes.figure.legend(
            [handle for handle, _ in entries],
            [method_title(name) for _, name in entries],
            loc="outside upper left",
            ncols=len(entries) // 2,
            handletextpad=0.2,
            columnspacing=1.2,
        )


def _plain_decades(axis: Any) -> None:
    """Labels a logarithmic axis at 1, 2 and 5 of every decade, in plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def _occupied(histograms: Iterable[Mapping[str, Any]]) -> tuple[float, float]:
    """Returns the range of the bins that hold anything, so that empty decades are not drawn."""
    low, high = math.inf, -math.inf
    for bins in histograms:
        filled = np.flatnonzero(bins["counts"])
        if filled.size:
            low = min(low, bins["edges"][filled[0]])
            high = max(high, bins["edges"][filled[-1] + 1])
    return (low, high) if low < high else (1e-9, 1.0)


def _bars(
    axes: Any, lengths: list[float | int], colours: list[str], words: str, xlabel: str
) -> None:
    bars = axes.barh(range(len(lengths)), lengths, color=colours, height=0.66)
    axes.bar_label(bars, [words.format(length) for length in lengths], padding=3, fontsize=8.5)
    axes.set_xlim(0, 1.3 * max([*lengths, 1e-9]))
    axes.set(xlabel=xlabel)
    axes.tick_params(left=False)
    axes.spines["left"].set_visible(False)
