"""How every figure of the report is drawn: one ink, one palette, one frame; and curves over training.

One colour per method in every figure, taken from a palette that stays apart for the common colour-blind eyes
and reads on white and on near-black. Everything that is not data (text, ticks, frame) is drawn in one ink, so
`inline_svg` can hand that ink to the page's text colour and a figure follows the theme of its page.

Figures are as wide as a phone shows them, so that their text is as large there as the text around them; a wide page
sets them side by side. A legend stands above its axes, never on the data.

Bytes are reproducible for one version of matplotlib (no dates, no random names), which is imported only to draw.
Source of the palette: Okabe and Ito, "Color Universal Design" (2008), blue lightened for dark backgrounds.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

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
SPARE = ("#56b4e9", "#b8a100", "#7c6fd0", "#a0522d")
SEQUENCE = (
    "#2f86d8", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#7c6fd0", "#56b4e9", "#a0522d",
)  # fmt: skip
"""Colours of things that are not methods: runs, classes of sites."""

Style = Mapping[str, Any]
Number = int | float
"""What a JSON file may hold for a float."""
WIDTH, HEIGHT = 4.5, 3.0
_LINE = 0.19
"""Inches that a line of a legend takes."""
_DASHES = ("-", "--", ":", "-.")
_STYLE: dict[Any, Any] = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.linewidth": 0.8,
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "legend.frameon": False,
    "legend.fontsize": 9,
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


def method_in(label: str) -> str | None:
    """Returns the method a label names, by its name or its title; the longest wins (qat_ce over
    qat)."""
    named = {name: method for method in COLOURS for name in (method, method_title(method).lower())}
    words = re.sub(r"[^a-z0-9_, ]", " ", label.lower())
    found = [name for name in named if re.search(rf"(?<![a-z0-9]){name}(?![a-z0-9])", words)]
    return named[max(found, key=len)] if found else None


def styles_of(labels: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Returns a colour and a dash for every label.

    Where labels name methods, each has its method's colour, and those of one method differ by dash. Where only some
    do, or one method has several labels and no other is there, the colours are those of a sequence.
    """
    names = list(dict.fromkeys(labels))
    methods = [method_in(name) for name in names]
    if names and (None in methods or len(set(methods)) == 1 < len(names)):
        methods = [None] * len(names)
        palette: Sequence[str] = SEQUENCE
    else:
        palette = SPARE
    return dict(zip(names, _styles(methods, palette), strict=True))


def line_styles(labels: Iterable[str]) -> list[dict[str, Any]]:
    """Returns a colour and a dash for every label; labels of one method share the colour."""
    return _styles([method_in(label) for label in labels], SPARE)


def _styles(methods: Sequence[str | None], palette: Sequence[str]) -> list[dict[str, Any]]:
    styles, uses = [], dict.fromkeys(COLOURS.values(), 0) | dict.fromkeys(palette, 0)
    spare = 0
    for method in methods:
        colour = COLOURS[method] if method else palette[spare % len(palette)]
        spare += method is None
        styles.append({"color": colour, "linestyle": _DASHES[uses[colour] % 4]})
        uses[colour] += 1
    return styles


def loss_curves(
    curves: Mapping[str, Sequence[Sequence[Any]]],
    ylabel: str,
    logx: bool = False,
    form: str = "svg",
    *,
    logy: bool = False,
    styles: Mapping[str, Style] | None = None,
) -> bytes:
    """Returns a figure of values against training steps, one line per label.

    Units: each curve is a sequence of (step, value); with `logx` the step axis is logarithmic above
    1 and keeps step 0; `logy` is for values above zero.
    Raises: ValueError for a form other than 'svg' and 'png'.
    """
    chosen = styles or dict(zip(curves, line_styles(curves), strict=True))

    def draw(axes: Any) -> None:
        for label, curve in curves.items():
            steps, values = np.asarray(curve, dtype=np.float64).reshape(-1, 2).T
            few = {"marker": "o", "markersize": 3} if 0 < len(steps) <= 12 else {}
            axes.plot(steps, values, label=method_title(label), **chosen[label], **few)
        if logx:
            axes.set_xscale("symlog", linthresh=1)
        else:
            _few_ticks(axes.xaxis)
        if logy:
            axes.set_yscale("log")
            plain_decades(axes.yaxis)
        else:
            _few_ticks(axes.yaxis, whole=False)
        axes.set(xlabel="training step", ylabel=ylabel)
        grid(axes)
        legend_above(axes, curves)

    return figure_of(draw, form, entries=curves)


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
    draw: Callable[[Any], None],
    form: str,
    size: tuple[float, float] = (WIDTH, HEIGHT),
    panels: int = 1,
    *,
    rows: int = 1,
    sharey: bool = True,
    entries: Iterable[str] = (),
) -> bytes:
    """Returns a figure in the style of all; `draw` fills its axes (an array of them where there are several).

    `entries` are the labels of a legend above the axes: the figure is taller by their lines.
    Units: `size` in inches; `panels` in each of `rows`.
    """
    if form not in ("svg", "png"):
        raise ValueError(f"plot form {form!r}: expected 'svg' or 'png'")
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        tall = size[1] + _LINE * _legend_lines(entries)
        figure = Figure(figsize=(size[0], tall), layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure.subplots(rows, panels, sharey=sharey and panels > 1))
        out = io.BytesIO()
        if form == "png":
            figure.savefig(out, format=form, dpi=160, facecolor="white")
        else:
            # The default metadata holds the date and addresses of vocabularies.
            nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
            figure.savefig(out, format=form, transparent=True, metadata=nothing)
    return out.getvalue()


def short(label: str, most: int = 40) -> str:
    """Returns a label that fits a legend: of a long one its beginning and its end."""
    if len(label) <= most:
        return label
    return f"{label[: most // 2 - 1]}…{label[-(most // 2) :]}"


def legend_above(axes: Any, entries: Iterable[str], handles: Sequence[Any] | None = None) -> None:
    """Puts a legend above the axes, in as many columns as fit."""
    labels = [short(method_title(label)) for label in entries]
    if not labels:
        return
    if handles is None:
        handles, known = axes.get_legend_handles_labels()
        if len(handles) != len(labels):
            labels = [short(label) for label in known]
    axes.figure.legend(
        handles, labels, loc="outside upper left", ncols=_legend_columns(labels), handlelength=1.7,
        handletextpad=0.5, columnspacing=1.2, borderpad=0.1, labelspacing=0.3,
    )  # fmt: skip


def grid(axes: Any, axis: str = "y") -> None:
    """Draws faint lines at the ticks."""
    axes.grid(axis=axis, color=INK, alpha=0.12, linewidth=0.7)
    axes.set_axisbelow(True)


def plain_decades(axis: Any) -> None:
    """Labels a logarithmic axis at 1, 2 and 5 of every decade, in plain numbers; of many decades only each."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    low, high = axis.get_view_interval()
    wide = high / low if low > 0 else math.inf
    subs = (1.0, 2.0, 5.0) if wide < 1e3 else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs) if wide > 4 else MaxNLocator(5))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def _few_ticks(axis: Any, whole: bool = True) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(5, integer=whole))


def _legend_columns(labels: Sequence[str]) -> int:
    longest = max((len(label) for label in labels), default=1)
    return max(1, min(3, len(labels), 54 // (longest + 6)))


def _legend_lines(entries: Iterable[str]) -> int:
    labels = [short(method_title(label)) for label in entries]
    return -(-len(labels) // _legend_columns(labels)) if labels else 0
