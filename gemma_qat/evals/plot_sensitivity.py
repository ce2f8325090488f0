"""The figure of a sensitivity study: bars of the KL that each class adds, beside the megabytes that it saves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gemma_qat.evals.plots import COLOURS, INK, figure_of

_PALETTE = [COLOURS[name] for name in ("qat", "mse", "qat_ce", "float_control", "rtn")]


def sensitivity_bars(rows: Sequence[Mapping[str, Any]], form: str = "svg") -> bytes:
    """Returns bars of KL with their intervals and of megabytes saved, a line per row in the order given.

    Each row is one of `rank`'s. Colour is the format. The axis of KL is logarithmic where the rows span two decades.
    Units: nats per token; 1e6 bytes against bfloat16.
    Raises: ValueError for a form other than 'svg' and 'png'.
    """
    formats = list(dict.fromkeys(row["format"] for row in rows))
    colours = [_PALETTE[formats.index(row["format"]) % len(_PALETTE)] for row in rows]
    places = range(len(rows))

    def draw(axes: Any) -> None:
        added, saved = axes
        values = [row["kl_mean"]["value"] for row in rows]
        ends = [
            [max(0.0, row["kl_mean"]["value"] - row["kl_mean"]["low"]) for row in rows],
            [max(0.0, row["kl_mean"]["high"] - row["kl_mean"]["value"]) for row in rows],
        ]
        added.barh(
            places, values, xerr=ends, color=colours, height=0.66,
            error_kw={"ecolor": INK, "elinewidth": 1.0, "capsize": 2.5},
        )  # fmt: skip
        added.set_yticks(places, [f"{row['class']} ({row['format']})" for row in rows])
        added.set(xlabel="KL added (nats per token)")
        bars = saved.barh(places, [row["saved"] / 1e6 for row in rows], color=colours, height=0.66)
        saved.bar_label(bars, [_megabytes(row["saved"]) for row in rows], padding=3, fontsize=8.5)
        saved.set_xlim(0, 1.35 * max([row["saved"] / 1e6 for row in rows] + [1e-9]))
        saved.set(xlabel="saved against bfloat16 (MB)")
        saved.tick_params(labelleft=False)
        if 0 < 100 * min(values) < max(values):  # Formats of few and many bits are decades apart.
            added.set_xscale("log")
            added.set_xlim(left=min(values) / 2)
        else:
            added.locator_params(axis="x", nbins=4)
        for one in axes:
            one.tick_params(left=False)
            one.spines["left"].set_visible(False)
        added.invert_yaxis()

    height = max(1.8, 0.3 * len(rows) + 0.9)
    return figure_of(draw, form, size=(7.2, height), panels=2)


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.0f}" if size >= 1e8 else f"{size / 1e6:#.3g}"
