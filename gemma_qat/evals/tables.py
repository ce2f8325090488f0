"""An evaluation on the console: statistics by model, then parts of the text, then differences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gemma_qat.evals.results import estimate_text

STATISTICS = (
    ("perplexity", "perplexity", "{:,.4f}"),
    ("perplexity_ratio", "perplexity / reference's", "{:.4f}"),
    ("nll", "loss, nats/token", "{:.4f}"),
    ("bits_per_byte", "bits/byte", "{:.4f}"),
    ("kl_mean", "KL mean, nats/token", "{:.6f}"),
    ("kl_median", "KL median", "{:.6f}"),
    ("kl_p90", "KL 90 %", "{:.6f}"),
    ("kl_p99", "KL 99 %", "{:.6f}"),
    ("kl_p999", "KL 99.9 %", "{:.6f}"),
    ("kl_max", "KL maximum", "{:.6f}"),
    ("top1_agreement", "same top", "{:.3%}"),
    ("rms_shift", "RMS \u0394p", "{:.3%}"),
    ("mean_shift", "mean \u0394p", "{:+.3%}"),
)
"""Every statistic of a summary: its key, its name, how it is written."""

PARTS = tuple(
    row for row in STATISTICS if row[0] in ("perplexity_ratio", "kl_mean", "top1_agreement")
)
_DIFFERENCES = tuple(
    row for row in STATISTICS if row[0] in ("nll", "bits_per_byte", "kl_mean", "top1_agreement")
)


def print_evaluation(found: Mapping[str, Any]) -> None:
    """Prints what `evaluation.run` returns."""
    from rich.console import Console

    models = found["models"]
    width = max(100, 44 + 30 * max(len(models), 3))
    console = Console(width=None if Console().is_terminal else width)
    text = found["text"]
    for warning in text["warnings"]:
        console.print(f"warning: {warning}", soft_wrap=True)
    console.print(_statistics(found))
    console.print(
        f"{text['documents']} documents, {text['tokens']:,} tokens in rows of {text['length']}; in brackets 95 % of "
        f"{found['reference']['summary']['draws']} resamples of the documents",
        style="dim", soft_wrap=True,
    )  # fmt: skip
    for name, model in models.items():
        if "categories" in model:
            rows = [(category, part) for category, part in model["categories"].items()]
            console.print(_parts(f"{name}, by category", "category", rows))
        rows = [(f"{part['from']}\u2013{part['to'] - 1}", part) for part in model["positions"]]
        console.print(_parts(f"{name}, by position", "tokens before", rows))
    if found["differences"]:
        console.print(_differences(found["differences"]))
    if "tasks" in found:
        console.print(_tasks(found["tasks"]))


def _statistics(found: Mapping[str, Any]) -> Any:
    columns = {f"reference\n{found['reference']['name']}": found["reference"]["summary"]}
    for name, model in found["models"].items():
        size = f"{model['recipe']}, {model['bytes'] / 1e6:,.2f} MB"
        columns[f"{name}\n{size}"] = model["summary"]
        if "own" in model:
            columns[f"{name}\nbeside {model['own']['name']}"] = model["own"]["summary"]
    table = _table(["", *columns])
    for key, title, form in STATISTICS:
        table.add_row(title, *(_cell(summary.get(key), form) for summary in columns.values()))
    return table


def _parts(title: str, first: str, rows: list[tuple[str, Mapping[str, Any]]]) -> Any:
    table = _table([first, "tokens", *(name for _, name, _ in PARTS)], title)
    for name, part in rows:
        cells = [_cell(part.get(key), form) for key, _, form in PARTS]
        table.add_row(_plain(name), f"{part['tokens']:,}", *cells)
    return table


def _differences(differences: Mapping[str, Mapping[str, Any]]) -> Any:
    table = _table(["difference", *(name for _, name, _ in _DIFFERENCES)], "paired differences")
    for name, estimates in differences.items():
        cells = [
            _cell(estimates[key], form) + ("" if estimates[key]["excludes_zero"] else "\nholds 0")
            for key, _, form in _DIFFERENCES
        ]
        table.add_row(_plain(name), *cells)
    return table


def _tasks(found: Mapping[str, Any]) -> Any:
    """A row a metric of each task; errors are lm-eval's standard errors."""
    models = found["models"]
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for name, results in models.items():
        for task, result in results.items():
            for metric, one in result["metrics"].items():
                error = "" if one["stderr"] is None else f" ± {one['stderr']:.4f}"
                rows.setdefault((task, metric), {})[name] = f"{one['value']:.4f}{error}"
    table = _table(["task", "metric", *models], f"tasks of lm-eval {found['lm_eval']}")
    for (task, metric), cells in rows.items():
        table.add_row(_plain(task), _plain(metric), *(cells.get(name, "") for name in models))
    return table


def _cell(estimate: Any, form: str) -> str:
    value, ends = estimate_text(estimate, form)
    return f"{value}\n[{ends}]".replace("\u2009\u2026\u2009", ", ") if ends else value


def _table(headings: list[str], title: str = "") -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title or None, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, heading in enumerate(headings):
        table.add_column(_plain(heading), justify="right" if index else "left", overflow="fold")
    return table


def _plain(name: str) -> Any:
    from rich.text import Text

    return Text(name)
