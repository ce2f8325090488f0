"""The page's table of lm-eval's tasks."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from gemma_qat.evals import page_parts as parts


def tasks_section(found: Mapping[str, Any]) -> str:
    """Returns a row for every metric of every task, a column for every model, with lm-eval's standard errors."""
    models = found["models"]
    cells: dict[tuple[str, str], dict[str, Any]] = {}
    for name, results in models.items():
        for task, result in results.items():
            for metric, one in result["metrics"].items():
                cells.setdefault((task, metric), {})[name] = one
    rows = []
    for (task, metric), by_model in cells.items():
        shots = found["tasks"].get(task, {}).get("shots")
        below = "" if shots is None else f", {shots} shots"
        row = "".join(_cell(by_model.get(name)) for name in models)
        rows.append(
            f"<tr><th>{parts.breakable(task)}<small>{escape(metric + below)}</small></th>{row}</tr>"
        )
    if not rows:
        return ""
    words = f"Tasks of lm-eval {found['lm_eval']}; small figures are its standard errors."
    return f"<h3>Tasks</h3>\n{parts.table(['task', *models], rows)}{parts.note(words)}"


def _cell(one: Mapping[str, Any] | None) -> str:
    if one is None:
        return "<td>–</td>"
    error = "" if one.get("stderr") is None else f"<small>± {one['stderr']:.4f}</small>"
    return f"<td>{one['value']:.4f}{error}</td>"
