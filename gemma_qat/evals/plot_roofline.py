"""A plot of how near packed decoding comes to the bandwidth of a copy: colours are formats, markers are operations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gemma_qat.evals.bench_decode import Speed
from gemma_qat.evals.bench_whole import Whole
from gemma_qat.evals.plots import figure_of

_MARKERS = {
    "product": "o", "integer": "s", "experts": "D", "integer_experts": "d", "head": "^",
    "attention": "P", "whole model": "*",
}  # fmt: skip
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#7c6fd0", "#b8a100", "#56b4e9", "#a0522d")


def roofline(speeds: Sequence[Speed], wholes: Sequence[Whole], form: str = "svg") -> bytes:
    """Returns a figure: bytes that a call or a step reads against its share of a copy's bandwidth.

    One point a measurement; of the fewest rows filled, of more hollow.
    Raises: ValueError for a form other than 'svg' and 'png'.
    """
    points = [(s.kind, s.format, s.rows, s.bytes, s.share) for s in speeds] + [
        ("whole model", w.weights, w.batch, w.batch * w.bytes_per_token, w.roofline_share)
        for w in wholes
        if w.bytes_per_token is not None and w.roofline_share is not None
    ]
    formats = list(dict.fromkeys(point[1] for point in points))
    colours = {name: _COLOURS[number % len(_COLOURS)] for number, name in enumerate(formats)}
    fewest = min((point[2] for point in points), default=1)

    def draw(axes: Any) -> None:
        for kind, name, rows, read, share in points:
            axes.plot(
                [read / 2**20], [share], marker=_MARKERS[kind], linestyle="", color=colours[name],
                fillstyle="full" if rows == fewest else "none", alpha=0.75,
                markersize=10 if kind == "whole model" else 5,
            )  # fmt: skip
        axes.axhline(1.0, linewidth=0.8, linestyle=":", color="grey")
        axes.set_xscale("log")
        axes.set(xlabel="MiB read", ylabel="share of a copy's bandwidth", ylim=(0, None))
        _legend(axes, colours, [kind for kind in _MARKERS if any(p[0] == kind for p in points)])

    return figure_of(draw, form, size=(7.6, 4.2))


def _legend(axes: Any, colours: dict[str, str], kinds: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], linestyle="", marker="s", color=colour, label=name)
        for name, colour in colours.items()
    ]
    handles += [_in_black(kind) for kind in kinds]
    axes.figure.legend(handles=handles, loc="outside right upper", handletextpad=0.2)


def _in_black(kind: str) -> Any:
    from matplotlib.lines import Line2D

    marker, label = _MARKERS[kind], kind.replace("_", " ")
    return Line2D([], [], linestyle="", marker=marker, color="black", fillstyle="none", label=label)
