"""The figures of runs: curves of training, what the grid does to weights, what is stored, how fast it decodes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from gemma_qat.evals import plots
from gemma_qat.evals.figure import GRID, SPEED, STORED, TRAINING, Figure
from gemma_qat.evals.plot_roofline import roofline
from gemma_qat.evals.plot_sites import bits_per_site, code_use, error_per_layer, expert_load
from gemma_qat.evals.run_files import class_of

CURVES: Mapping[str, tuple[str, str, bool]] = {
    "loss": ("training loss (nats per token)", "What training minimizes, step by step.", False),
    "kl": ("KL to the teacher (nats per token)", "Divergence from the teacher on training rows.", True),
    "nll": ("cross entropy (nats per token)", "Loss on the text itself, whatever is trained on.", False),
    "agree": ("same top token (share)", "How often student and teacher put the same token first.", False),
    "hidden": ("relative squared error of hidden states", "How far hidden states are from the teacher's.", True),
    "flipped": ("codes that flipped (share)", "Codes that changed since the last report, as weights settle.", True),
    "clipped": ("weights that saturate (share)", "Weights beyond the last code of their tile.", False),
    "scale_drift": ("mean |ln scale ratio|", "How far scales moved since the last report.", False),
    "grad_norm": ("norm of the gradient", "Norm of the gradient, before clipping.", True),
    "learning_rate": ("learning rate", "Learning rate.", False),
    "expert_load": ("busiest expert (times even)", "Load of the busiest expert; 1 is even.", False),
    "tokens_per_second": ("tokens per second", "Speed over all devices. The first report holds compiling.", False),
    "mfu": ("share of peak FLOP/s", "Model FLOP/s utilization: the mathematics over the devices' peak.", False),
}  # fmt: skip
"""Metrics that are drawn: the axis, the caption, whether the axis is logarithmic."""

BY_LAYER = (
    (
        "relative_error", "relative error (%)",
        "Error that rounding leaves{}, by layer: the norm of w - round(w) over that of w.",
    ),
    ("clipped", "saturated weights (%)", "Weights beyond the last code{}, by layer."),
)  # fmt: skip


def of_curves(data: Mapping[str, Any]) -> Iterator[Figure]:
    """Yields the figures of training: a curve for each metric, a line for each run."""
    if data.get("curves"):
        ylabel = str(data.get("curves_ylabel", "loss (nats per token)"))
        yield Figure(
            name="loss", part=TRAINING, caption=f"Training, step by step: {_without_unit(ylabel)}.",
            draw=partial(plots.loss_curves, data["curves"], _axis(ylabel), False, logy=far_apart(data["curves"])),
        )  # fmt: skip
    for caption, panel in data.get("curve_panels", {}).items():
        yield Figure(
            name=f"curves {caption[:40]}", part=TRAINING, caption=caption,
            draw=partial(
                plots.loss_curves, panel["curves"], str(panel["ylabel"]), bool(panel.get("logx", False))
            ),
        )  # fmt: skip
    runs, styles = data.get("runs", {}), plots.styles_of(data.get("runs", {}))
    for key, (words, caption, logarithmic) in CURVES.items():
        curves = {
            name: run["curves"][key] for name, run in runs.items() if key in run.get("curves", {})
        }
        if key == "nll" and all(
            curve == runs[name]["curves"].get("loss") for name, curve in curves.items()
        ):
            continue  # cross entropy is what is trained on: the same figure
        if not any(len(curve) > 1 for curve in curves.values()):
            continue
        logy = logarithmic and far_apart(curves)
        yield Figure(
            name=key, part=TRAINING, caption=caption,
            draw=partial(plots.loss_curves, curves, words, False, logy=logy, styles=styles),
        )  # fmt: skip


def far_apart(curves: Mapping[str, Sequence[Sequence[plots.Number]]]) -> bool:
    """Returns whether values, all above zero, differ so much that small ones need a logarithmic axis to be read."""
    values = [value for curve in curves.values() for _, value in curve]
    return bool(values) and min(values) > 0 and max(values) > 10 * min(values)


def _axis(ylabel: str) -> str:
    """A label short enough for an axis: what is in brackets is said in the caption."""
    return ylabel if len(ylabel) <= 40 else ylabel.split(" (")[0]


def _without_unit(ylabel: str) -> str:
    return ylabel.replace("training loss, nats/token", "loss in nats per token")


def of_codes(runs: Mapping[str, Any]) -> Iterator[Figure]:
    """Yields the figures of what a grid does: error by layer, use of codes, load of experts."""

    def of(name: str) -> str:
        return f" of {name}" if len(runs) > 1 else ""

    for key, words, caption in BY_LAYER:
        found = {name: layer_lines(run.get("codes", {}), key) for name, run in runs.items()}
        highest = [y for lines in found.values() for line in lines.values() for _, y in line]
        for name, lines in found.items():
            if any(len(line) > 1 for line in lines.values()):
                yield Figure(
                    name=f"{key}_by_layer {name}", part=GRID, caption=caption.format(of(name)),
                    draw=partial(error_per_layer, lines, ylabel=words, top=1.08 * max(highest)),
                )  # fmt: skip
    for name, run in runs.items():
        loads = expert_loads(run.get("codes", {}))
        if loads:
            yield Figure(
                name=f"expert_load {name}", part=GRID,
                caption=f"Load of the experts{of(name)}, sorted within each layer; dotted is even.",
                draw=partial(expert_load, loads),
            )  # fmt: skip
    codes = {name: run["codes"] for name, run in runs.items() if run.get("codes")}
    use = {name: found["code_use"] for name, found in codes.items() if found.get("code_use")}
    if use:
        styles = plots.styles_of(runs)
        yield Figure(
            name="code_use", part=GRID,
            caption="How often each code is used, over all sites of a format. A grid is used well when no code is idle "
            "and the ends do not pile up.",
            draw=partial(code_use, use, styles=styles),
        )  # fmt: skip


def layer_lines(
    codes: Mapping[str, Any], key: str
) -> dict[str, list[tuple[plots.Number, plots.Number]]]:
    """Returns {CLASS OF SITES: [(layer, value in percent)]} of the sites that stand in a layer."""
    lines: dict[str, list[tuple[plots.Number, plots.Number]]] = {}
    for path, site in codes.get("sites", {}).items():
        layer = site.get("layer")
        if layer is None:
            match = re.match(r"layers/(\d+)/", path)
            layer = int(match.group(1)) if match else None
        if isinstance(layer, int | float) and layer >= 0 and key in site:
            lines.setdefault(class_of(path), []).append((layer, 100 * site[key]))
    return {name: sorted(line) for name, line in lines.items()}


def expert_loads(codes: Mapping[str, Any]) -> dict[str, list[plots.Number]]:
    """Returns {LAYER: [load of each expert]}, of a list per layer or a mapping with "counts" or "shares"."""
    out = {}
    for name, load in codes.get("expert_load", {}).items():
        if isinstance(load, Mapping):
            load = next((load[key] for key in ("counts", "shares", "load") if key in load), None)
        if (
            isinstance(load, list)
            and len(load) > 1
            and all(isinstance(x, int | float) for x in load)
        ):
            match = re.search(r"\d+", str(name))
            out[f"layer {match.group()}" if match else str(name)] = load
    return out


def of_stored(data: Mapping[str, Any]) -> Iterator[Figure]:
    """Yields a figure of bits and bytes for each recipe or run."""
    for kind in ("recipes", "runs"):
        for name, section in data.get(kind, {}).items():
            rows = section.get("coverage")
            if rows:
                yield Figure(
                    name=f"bits_per_site {name}", part=f"{STORED} {kind} {name}",
                    caption=f"Bits per weight and share of the bytes, {name}.",
                    draw=partial(bits_per_site, _largest(rows)),
                )  # fmt: skip


def _largest(rows: Sequence[Mapping[str, Any]], most: int = 14) -> list[Mapping[str, Any]]:
    """Rows worth a bar: those that hold a thousandth of the bytes, at most `most`."""
    return [row for row in rows if row["share"] >= 1e-3][:most] or list(rows[:most])


def of_benches(benches: Mapping[str, Any]) -> Iterator[Figure]:
    """Yields a roofline for each benchmark of packed decoding."""
    for name, bench in benches.items():
        speeds, wholes = bench.get("speeds", []), bench.get("whole", [])
        if speeds or any(whole.get("roofline_share") for whole in wholes):
            where = f" of {name}" if len(benches) > 1 else ""
            device = bench.get("environment", {}).get("device", "its device")
            yield Figure(
                name=f"roofline {name}", part=SPEED,
                caption=f"Packed decoding{where} on {device}: what a call reads against how near it comes to a "
                "copy's bandwidth. Filled: the fewest rows; hollow: more.",
                draw=partial(roofline, _objects(speeds), _objects(wholes)),
            )  # fmt: skip


def _objects(rows: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Rows of a file with the attributes that a measurement in memory has."""
    import types

    nothing = {"bytes_per_token": None, "roofline_share": None}
    return [types.SimpleNamespace(**{**nothing, **row}) for row in rows]
