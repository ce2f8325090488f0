"""A plot of how near packed products come to the bandwidth of a copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gemma_qat.evals.bench_decode import Speed
from gemma_qat.evals.plots import figure_of


def roofline(speeds: Sequence[Speed], form: str = "svg") -> bytes:
    """Returns a figure: bytes of a weight against its share of a copy's bandwidth, a line per format and rows.

    Raises: ValueError for a form other than 'svg' and 'png'.
    """
    lines: dict[str, list[Speed]] = {}
    for speed in speeds:
        rows = "1 row" if speed.rows == 1 else f"{speed.rows} rows"
        lines.setdefault(f"{speed.format}, {rows}", []).append(speed)

    def draw(axes: Any) -> None:
        for number, (label, own) in enumerate(lines.items()):
            points = sorted((s.bytes / 2**20, s.share) for s in own)
            axes.plot(
                *zip(*points, strict=True), marker="osD^v<>P"[number % 8], label=label, linewidth=1
            )
        axes.axhline(1.0, linewidth=0.8, linestyle=":", color="grey")
        axes.set_xscale("log")
        axes.set(
            xlabel="MiB of packed weight", ylabel="share of a copy's bandwidth", ylim=(0, None)
        )
        axes.legend(fontsize="small")

    return figure_of(draw, form)
