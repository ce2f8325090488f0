"""A plot of how near packed decoding comes to the bandwidth of a copy: colours are formats, markers are operations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gemma_qat.evals.plots import INK, SEQUENCE, figure_of, grid, legend_above

if TYPE_CHECKING:  # A page is made of files, without jax.
    from gemma_qat.evals.bench_decode import Speed
    from gemma_qat.evals.bench_whole import Whole

_MARKERS = {
    "product": "o", "integer": "s", "experts": "D", "integer_experts": "d", "head": "^",
    "attention": "P", "whole model": "*",
}  # fmt: skip


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
    colours = {name: SEQUENCE[number % len(SEQUENCE)] for number, name in enumerate(formats)}
    fewest = min((point[2] for point in points), default=1)
    kinds = list(dict.fromkeys(point[0] for point in points))
    entries = [*formats, *(kind.replace("_", " ") for kind in kinds)]

    def draw(axes: Any) -> None:
        for kind, name, rows, read, share in points:
            axes.plot(
                [read / 2**20], [share], marker=_MARKERS.get(kind, "x"), linestyle="",
                color=colours[name], fillstyle="full" if rows == fewest else "none", alpha=0.75,
                markersize=10 if kind == "whole model" else 5,
            )  # fmt: skip
        axes.axhline(1.0, linewidth=0.8, linestyle=":", color=INK)
        axes.set_xscale("log")
        axes.set(xlabel="MiB read", ylabel="share of a copy's bandwidth", ylim=(0, None))
        grid(axes)
        legend_above(axes, entries, [*map(_square, colours.values()), *map(_hollow, kinds)])

    return figure_of(draw, form, entries=entries)


def _square(colour: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], linestyle="", marker="s", color=colour)


def _hollow(kind: str) -> Any:
    from matplotlib.lines import Line2D

    marker = _MARKERS.get(kind, "x")
    return Line2D([], [], linestyle="", marker=marker, color=INK, fillstyle="none")
