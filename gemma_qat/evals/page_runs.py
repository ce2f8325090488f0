"""The page's tables of runs: what was trained, what is stored, how fast it is, what exports read back as."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from gemma_qat.evals import page_parts as parts
from gemma_qat.evals.figure import STORED

FIRST = (
    "model", "recipe", "start", "teacher", "train.loss", "train.steps", "train.batch_size",
    "data.kind", "data.path", "data.length", "optimizer.learning_rate", "scales",
)  # fmt: skip
"""Settings that are always shown; others where runs differ."""

ROWS = 20
"""Rows of a coverage table that are not folded away."""


def trained(runs: Mapping[str, Any]) -> str:
    """Returns the settings of all runs side by side, then machines, versions and data."""
    configs = {
        name: {key: value for key, value in run["config"].items() if key != "name"}
        for name, run in runs.items()
        if run.get("config")
    }
    body = f"<h3>Settings</h3>\n{parts.side_by_side(configs, FIRST)}" if configs else ""
    about = {name: run["about"] for name, run in runs.items() if run.get("about")}
    if about:
        keys = list(dict.fromkeys(key for one in about.values() for key, _ in parts.flat(one, ".")))
        body += f"<h3>Machine, versions and data</h3>\n{parts.side_by_side(about, keys[:24])}"
    last = _last_values(runs)
    if last:
        body += f"<h3>At the last report</h3>\n{last}"
    return body


LAST = (
    ("loss", "loss", "{:.4f}"),
    ("kl", "KL", "{:#.3g}"),
    ("agree", "same top", "{:.2%}"),
    ("flipped", "flipped", "{:.3%}"),
    ("clipped", "saturated", "{:.2%}"),
    ("tokens_per_second", "tokens/s", "{:,.0f}"),
    ("model_flops_per_second", "GFLOP/s", "{:,.1f}"),
    ("mfu", "MFU", "{:.1%}"),
    ("expert_load", "busiest expert", "{:.2f}×"),
)


def _last_values(runs: Mapping[str, Any]) -> str:
    curves = {name: run["curves"] for name, run in runs.items() if run.get("curves")}
    columns = [c for c in LAST if any(c[0] in found for found in curves.values())]
    rows = []
    for name, found in curves.items():
        step = max(curve[-1][0] for curve in found.values())
        cells = ""
        for key, _, form in columns:
            value = found[key][-1][1] if key in found else None
            if value is not None and key == "model_flops_per_second":
                value /= 1e9
            cells += parts.cell(value, form)
        rows.append(f"<tr><th>{parts.breakable(name)}</th><td>{step:,.0f}</td>{cells}</tr>")
    if not rows:
        return ""
    return parts.table(["run", "step", *(words for _, words, _ in columns)], rows)


def coverage(
    recipes: Mapping[str, Any], runs: Mapping[str, Any], drawn: Mapping[str, Sequence[str]]
) -> str:
    """Returns the figures of bits and bytes side by side, then for each recipe or run the table of all its arrays."""
    pictures: list[str] = []
    tables: list[str] = []
    for kind, sections in (("recipes", recipes), ("runs", runs)):
        for name, section in sections.items():
            if section.get("coverage"):
                pictures += drawn.get(f"{STORED} {kind} {name}", ())
                tables.append(_coverage(name, section))
    return parts.figures(pictures) + "\n".join(tables)


def _coverage(name: str, section: Mapping[str, Any]) -> str:
    rows = section["coverage"]
    acts = any(row.get("activations") for row in rows)
    body = [_coverage_row(row, acts) for row in rows]
    stored = section.get("bytes", sum(row["bytes"] for row in rows))
    whole = f"<b>{stored:,.0f}</b>"
    if section.get("float_bytes"):
        whole += f"<small>of {section['float_bytes']:,.0f} as float</small>"
    body.append(
        f"<tr class='total'><th>all</th><td></td><td></td><td></td><td>{whole}</td><td></td>"
        f"{'<td></td>' if acts else ''}</tr>"
    )
    headings = ["site", "format", "arrays", "bits/weight", "bytes", "share"]
    table = parts.table([*headings, *(["activations"] if acts else [])], body)
    if len(rows) <= ROWS:
        return f"<h3>{escape(name)}</h3>\n{table}"
    return parts.folded(f"{name}: {len(rows)} classes of arrays", table)


def _coverage_row(row: Mapping[str, Any], acts: bool) -> str:
    last = f'<td class="left">{escape(str(row.get("activations") or ""))}</td>' if acts else ""
    return (
        f"<tr><th>{parts.breakable(str(row['site']))}</th><td>{escape(str(row['format']))}</td>"
        f"<td>{row.get('count', '')}</td><td>{row['bits']:.3f}</td><td>{row['bytes']:,.0f}</td>"
        f"<td>{row['share']:.1%}</td>{last}</tr>"
    )


def speed(benches: Mapping[str, Any], runs: Mapping[str, Any]) -> str:
    """Returns tables of whole models decoding and of training steps, one of each per benchmark."""
    body = ""
    for name, bench in benches.items():
        heading = f"<h3>{escape(name)}</h3>\n" if len(benches) > 1 else ""
        where = parts.pairs(bench.get("environment", {}))
        tables = _whole(bench.get("whole", [])) + _costs(bench.get("costs", []))
        if bench.get("copy_bandwidth"):
            copied = f"A copy on this device moves {bench['copy_bandwidth'] / 1e9:,.1f} GB/s."
            where = parts.note(copied) + where
        body += heading + tables + where
    return body


def _whole(rows: Sequence[Mapping[str, Any]]) -> str:
    body = []
    for row in rows:
        cells = (
            ("tokens_per_second", "{:,.0f}", 1.0), ("seconds", "{:.3g} ms", 1e3),
            ("roofline_share", "{:.0%}", 1.0), ("speedup", "{:.2f}×", 1.0),
        )  # fmt: skip
        shown = "".join(
            parts.cell(None if row.get(key) is None else scale * row[key], form)
            for key, form, scale in cells
        )
        words = " ".join(str(row[key]) for key in ("size", "weights") if row.get(key))
        body.append(
            f"<tr><th>{parts.breakable(words)}<small>{escape(str(row.get('note') or ''))}</small></th>"
            f"<td>{escape(str(row['cache']))}</td><td>{row['batch']}</td>"
            f"<td>{row['weight_bytes'] / 1e6:,.1f}</td>{shown}</tr>"
        )
    headings = [
        "model",
        "cache",
        "batch",
        "MB",
        "tokens/s",
        "a step",
        "of the roofline",
        "over float",
    ]
    return parts.table(headings, body) if body else ""


def _costs(rows: Sequence[Mapping[str, Any]]) -> str:
    body = []
    for row in rows:
        size = row["bytes"] / 1e6 if row.get("bytes") else None
        cells = (
            (1e3 * row["seconds"], "{:,.1f}"), (row.get("time_ratio"), "{:.2f}×"), (size, "{:,.1f}"),
            (row.get("memory_ratio"), "{:.2f}×"),
        )  # fmt: skip
        shown = "".join(parts.cell(value, form) for value, form in cells)
        body.append(f"<tr><th>{escape(str(row['name']))}</th>{shown}</tr>")
    headings = ["training step", "ms", "of a float step", "MB", "of float memory"]
    return parts.table(headings, body) if body else ""


def exports(recipes: Mapping[str, Any], runs: Mapping[str, Any]) -> str:
    """Returns what every export was found to be when it was read back."""
    body = [
        f"<h3>{escape(name)}</h3>\n{parts.pairs(section['export'])}"
        for name, section in recipes.items()
        if section.get("export")
    ]
    columns = {
        f"{name}: {stem}" if len(run["exports"]) > 1 or stem != "export" else name: found
        for name, run in runs.items()
        for stem, found in run.get("exports", {}).items()
    }
    if columns:
        keys = [key for found in columns.values() for key, _ in parts.flat(found, ".")]
        body.append(parts.side_by_side(columns, list(dict.fromkeys(keys))))
    return "\n".join(body)


def decode(decode: Mapping[str, Any]) -> str:
    """Returns what the packed codes and the trained model write after a prompt, and whether it is the same."""
    if not decode:
        return ""
    verdict = ""
    if "tokens_equal" in decode:
        equal = bool(decode["tokens_equal"])
        words = "the same tokens" if equal else "different tokens"
        style = "good" if equal else "bad"
        verdict = (
            f'<p><span class="{style}">{words}</span> from the packed codes and from the model '
            "as it was trained, greedily decoded.</p>"
        )
    shown = (
        ("prompt", "Prompt"),
        ("packed_text", "Packed codes"),
        ("fake_quant_text", "As trained"),
    )
    return verdict + "".join(
        f"<h3>{words}</h3><pre>{escape(str(decode[key]))}</pre>"
        for key, words in shown
        if key in decode
    )
