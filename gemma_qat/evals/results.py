"""The figures of a report as plain values and as words: rows, headline, console table, digest.

The schema of `data` is in `report.py`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gemma_qat.evals import plots

BETWEEN = "\u2009\u2026\u2009"
"""Stands between the ends of an interval."""

NOT_FIGURES = ("timing", "environment", "figures_sha256")


COLUMNS = (
    ("nll", "loss, nats/token", "{:.4f}"),
    ("loss_gap", "loss gap, nats", "{:+.4f}"),
    ("kl_mean", "mean KL, nats", "{:#.3g}"),
    ("top1_agreement", "top-1 agreement", "{:.2%}"),
    ("bits_per_byte", "bits/byte", "{:.4f}"),
    ("kl_median", "median KL", "{:#.3g}"),
    ("kl_p99", "99% KL", "{:#.3g}"),
    ("perplexity", "perplexity", "{:,.2f}"),
)


CONSOLE_COLUMNS = COLUMNS[:4]


MAIN_COLUMNS = (
    ("kl_mean", "mean KL, nats", "{:#.3g}"),
    ("top1_agreement", "same top", "{:.2%}"),
    ("perplexity_ratio", "perplexity ratio", "{:.4f}"),
    ("loss_gap", "loss gap, nats", "{:+.4f}"),
    ("nll", "loss, nats/token", "{:.4f}"),
    ("bits_per_byte", "bits/byte", "{:.4f}"),
    ("perplexity", "perplexity", "{:,.2f}"),
)
"""The columns of the page's tables of quality; those below have a table of their own where there are many."""


TAIL_COLUMNS = (
    ("kl_median", "median KL", "{:#.3g}"),
    ("kl_p90", "90% KL", "{:#.3g}"),
    ("kl_p99", "99% KL", "{:#.3g}"),
    ("kl_p999", "99.9% KL", "{:#.3g}"),
    ("kl_max", "largest KL", "{:#.3g}"),
    ("rms_shift", "RMS shift of p", "{:.2%}"),
    ("mean_shift", "mean shift of p", "{:+.3%}"),
)


DIFFERENCES = (
    ("nll", "loss, nats/token", "{:+.4f}"),
    ("bits_per_byte", "bits/byte", "{:+.4f}"),
    ("kl_mean", "mean KL, nats", "{:+#.3g}"),
    ("top1_agreement", "same top", "{:+.2%}"),
    ("perplexity_ratio", "perplexity ratio", "{:+.4f}"),
    ("loss_gap", "loss gap, nats", "{:+.4f}"),
    ("rms_shift", "RMS shift of p", "{:+.2%}"),
    ("mean_shift", "mean shift of p", "{:+.3%}"),
    ("kl_median", "median KL", "{:+#.3g}"),
    ("kl_p99", "99% KL", "{:+#.3g}"),
)


def figures_digest(data: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of all sections of a report but those about the machine and the time."""
    figures = {key: value for key, value in plain(data).items() if key not in NOT_FIGURES}
    return hashlib.sha256(json.dumps(figures, sort_keys=True).encode()).hexdigest()


def plain(value: Any, where: str = "report") -> Any:
    """Returns the value with numpy scalars, arrays, tuples and paths replaced by what JSON can
    hold.

    Raises: ValueError, naming the place, for a number that is not finite or a value that JSON has
    no form for.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{where}/{key}") for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist(), where)
    if isinstance(value, list | tuple):
        return [plain(item, f"{where}/{index}") for index, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where}: {value} is not a finite number, expected one for JSON")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    raise ValueError(f"{where}: {type(value).__name__} has no JSON form, expected plain values")


def console_table(data: Mapping[str, Any]) -> Any:
    """Returns the table of quality as a `rich.table.Table`: a row per model, intervals below.

    The columns are the first ones of the page's table, so that the table fits a terminal.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    title = Text(str(data.get("title", "quality")), style="bold")
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("recipe")
    table.add_column("method")
    for heading in ("MB", *(heading for _, heading, _ in CONSOLE_COLUMNS)):
        table.add_column(heading, justify="right", overflow="fold")
    previous = None
    for recipe, method, size, summary in quality_rows(data):
        if previous is not None and recipe != previous:
            table.add_section()
        shown = recipe if recipe != previous else ""
        cells = [Text(word) for word in (shown, method, megabytes(size))]
        for key, _, form in CONSOLE_COLUMNS:
            value, ends = estimate_text(summary.get(key), form)
            below = "\n" + ends.replace("\u2009", "") if ends else ""
            cells.append(Text.assemble(value, (below, "dim")))
        table.add_row(*cells)
        previous = recipe
    return table


def headline(data: Mapping[str, Any]) -> str:
    """Returns one sentence with the result of the first recipe: what was won back, in what size.

    The loss gap is told first; where PTQ lost nothing measurable, the divergence; else that.
    """
    for recipe, section in data.get("recipes", {}).items():
        for versus, won in section.get("recovered", {}).items():
            against = plots.method_title(versus)
            for key, what in (("loss_gap", "loss"), ("kl_mean", "divergence")):
                if won.get(key, {}).get("value") is not None:
                    lost = f"the {what} that {against} costs"
                    return f"Training on the {recipe} grid {won_back(won[key], lost)}{size_share(section)}."
            return f"On the {recipe} grid {against} lost nothing measurable to win back."
    return _evaluation_headline(data)


def _evaluation_headline(data: Mapping[str, Any]) -> str:
    found = best_model(data)
    if found is None:
        return _run_headline(data.get("runs", {}))
    name, model, reference = found
    summary = model["summary"]
    kl, ends = estimate_text(summary["kl_mean"], "{:.3g}")
    words = f"{name} is {kl} nats from {reference} in mean KL"
    if ends:
        words += f" ({' to '.join(ends.split(BETWEEN))})"
    if "top1_agreement" in summary:
        share = estimate_text(summary["top1_agreement"], "{:.1%}")[0]
        words += f" and makes the same first choice on {share} of tokens"
    return f"{words}{size_share(model)}."


def _run_headline(runs: Mapping[str, Any]) -> str:
    """What a single run did to its loss; several have no sentence in common."""
    if len(runs) != 1:
        return ""
    (name, run), *_ = runs.items()
    loss = run.get("curves", {}).get("loss", [])
    if len(loss) < 2:
        return ""
    (_, first), (step, last) = loss[0], loss[-1]
    return (
        f"{name}: training loss from {first:.4g} to {last:.4g} by step {step:,}{size_share(run)}."
    )


def best_model(data: Mapping[str, Any]) -> tuple[str, Mapping[str, Any], str] | None:
    """Returns (name, model, name of the reference) of the quantized model with the least mean KL; None without one."""
    for evaluation in data.get("evaluations", []):
        held = {n: m for n, m in evaluation["models"].items() if "kl_mean" in m["summary"]}
        held = {n: m for n, m in held.items() if m.get("recipe", "float") != "float"} or held
        if held:
            name = min(
                held, key=lambda n: float(estimate_text(held[n]["summary"]["kl_mean"], "{}")[0])
            )
            return name, held[name], str(evaluation["reference"].get("name", "the reference"))
    return None


def quality_rows(data: Mapping[str, Any]) -> Iterator[tuple[str, str, Any, Mapping[str, Any]]]:
    """Yields (recipe, method, stored bytes, summary) for every model of the report."""
    recipes = data.get("recipes", {})
    sizes = [section["float_bytes"] for section in recipes.values() if "float_bytes" in section]
    reference = data.get("float", {})
    if "bigram" in reference:
        yield "reference", "bigram", None, reference["bigram"]
    if "nll" in reference:
        yield "reference", "float", max(sizes, default=None), reference
    for recipe, section in recipes.items():
        for method, summary in methods_of(recipe, section).items():
            stored = "float_bytes" if method == "float_control" else "bytes"
            yield recipe, method, section.get(stored), summary


def methods_of(recipe: str, section: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Returns the summary of every method of a recipe, those trained on cross-entropy included."""
    extra = section.get("cross_entropy", {})
    if extra and "methods" not in extra:
        given = ", ".join(extra)
        raise ValueError(f"recipes/{recipe}/cross_entropy: has {given}, expected 'methods'")
    return {**section.get("methods", {}), **extra.get("methods", {})}


def estimate_text(estimate: Any, form: str) -> tuple[str, str]:
    """Returns (value, interval) as words; a bare number has no interval, a missing one is a
    dash."""
    if estimate is None:
        return "–", ""
    if not isinstance(estimate, Mapping):
        return form.format(estimate), ""
    if estimate.get("low") is None or estimate["low"] == estimate["high"]:
        return form.format(estimate["value"]), ""
    ends = (form.format(estimate[key]) for key in ("low", "high"))
    return form.format(estimate["value"]), BETWEEN.join(ends)


def megabytes(size: Any) -> str:
    """Returns bytes in megabytes, in words; a dash for none."""
    return "–" if size is None else f"{size / 1e6:,.2f}"


def won_back(estimate: Mapping[str, Any], lost: str) -> str:
    """Returns in words what share of a loss training recovered."""
    value, low, high = (estimate[key] for key in ("value", "low", "high"))
    if high < 0:
        return f"made {lost} {-value:.0f}% ({-high:.0f} to {-low:.0f}) larger"
    share = f"{value:.0f}% ({low:.0f} to {high:.0f})"
    if low <= 0:
        return f"did not measurably win back {lost}, {share}"
    return f"wins back {share} of {lost}"


def size_share(section: Mapping[str, Any]) -> str:
    """Returns in words what share of the float bytes a recipe needs; empty when unknown."""
    if not section.get("bytes") or not section.get("float_bytes"):
        return ""
    return f", in {section['bytes'] / section['float_bytes']:.0%} of the bytes"
