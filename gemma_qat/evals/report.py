"""The report of a run: report.json for programs, report.html for people, a table for the console.

`data` is one dictionary of plain values. Only `title` is needed; a section that is missing is not
shown. A *summary* is what `summary.summarize` returns; an *estimate* is {"value", "low", "high"};
names in capitals are chosen by the caller.

    title           the heading
    headline        a sentence to lead with; written from the figures when missing
    model           {KEY: value}: size, parameters, vocab, ...
    environment     {KEY: value}: versions, device, ...
    float           a summary, with "bigram": {"nll": estimate or number} beside it
    recipes         {RECIPE: {
        bytes, float_bytes     stored bytes of the recipe and of the float model
        coverage               rows {site, format, bits, bytes, share, count}
        methods                {"rtn" | "mse" | "qat" | METHOD: summary}
        differences            {"qat-rtn" | "qat-mse" | NAME: summary.paired_difference}
        recovered              {"rtn" | "mse": summary.recovered}, QAT against that method
        cross_entropy          {"methods": {"qat_ce", "float_control": summary},
                                "differences", "recovered"}: the same, trained without a teacher
        export                 {KEY: value}, nested as deep as needed
    }}
    curves          {LABEL: [[step, value], ...]};  curves_ylabel names their unit
    curve_panels    {CAPTION: {"ylabel", "curves", "logx" (optional)}}: further figures of curves
    kl_histograms   {LABEL: {"edges", "counts"}} as summary.kl_counts makes them
    decode          {"prompt", "packed_text", "fake_quant_text", "tokens_equal"}
    timing          {KEY: value}: seconds, tokens per second

report.json holds `data` with sorted keys, plus `figures_sha256`: the digest of everything but
`timing` and `environment`. Two runs that measured the same thing have the same digest; the file
differs in those two sections only.

The page is one file with inline styles and inline figures: it loads nothing and can be mailed.

The file is long because a page is: its tables, notes and styles are read together.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from gemma_qat.evals import plots

NOT_FIGURES = ("timing", "environment", "figures_sha256")
# Summary key, heading, format of the value and of the ends of its interval.
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
DIFFERENCES = (
    ("nll", "loss, nats/token", "{:+.4f}"),
    ("bits_per_byte", "bits/byte", "{:+.4f}"),
    ("kl_mean", "mean KL, nats", "{:+#.3g}"),
    ("top1_agreement", "top-1 agreement", "{:+.2%}"),
)


def write_report(data: Mapping[str, Any], out_dir: Path) -> tuple[Path, Path]:
    """Writes report.json and report.html into `out_dir` and returns their paths.

    Each file is written beside its name and moved over it, so a reader never sees half a report.
    Raises: ValueError, naming the place in `data`, for a number that is not finite or a value that
    JSON has no form for.
    """
    report = plain(data)
    report["figures_sha256"] = figures_digest(report)
    out_dir.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
    json_path, html_path = out_dir / "report.json", out_dir / "report.html"
    _replace(json_path, text + "\n")
    _replace(html_path, html_page(report))
    return json_path, html_path


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
    for recipe, method, size, summary in _quality_rows(data):
        if previous is not None and recipe != previous:
            table.add_section()
        shown = recipe if recipe != previous else ""
        cells = [Text(word) for word in (shown, method, _megabytes(size))]
        for key, _, form in CONSOLE_COLUMNS:
            value, ends = _estimate(summary.get(key), form)
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
                    return (
                        f"Training on the {recipe} grid {_won(won[key], lost)}{_smaller(section)}."
                    )
            return f"On the {recipe} grid {against} lost nothing measurable to win back."
    return ""


def html_page(data: Mapping[str, Any]) -> str:
    """Returns the whole page: inline styles, inline figures, every text escaped, nothing to
    load."""
    title = escape(str(data.get("title", "Report")))
    lead = escape(str(data.get("headline") or headline(data)))
    sections = "\n".join(
        f"<section><h2>{heading}</h2>\n{body}\n</section>"
        for heading, body in _sections(data)
        if body
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>\n"
        f'<header><h1>{title}</h1>\n<p class="lead">{lead}</p>\n{_cards(data)}</header>\n'
        f"{sections}\n<footer>Figures {escape(figures_digest(data)[:16])}: two runs with the same "
        "digest measured the same numbers.</footer>\n</main>\n</body>\n</html>\n"
    )


def _sections(data: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields (heading, body) in the order of the page; an empty body is left out."""
    recipes = data.get("recipes", {})
    yield "Quality on held-out text", _quality(data)
    yield "What training changed", _changes(recipes)
    yield "Figures", _figures(data)
    yield (
        "What is stored, and how",
        "\n".join(
            _coverage(name, section) for name, section in recipes.items() if section.get("coverage")
        ),
    )
    yield (
        "Export, read back and compared",
        "\n".join(
            f"<h3>{escape(name)}</h3>\n{_pairs(section['export'])}"
            for name, section in recipes.items()
            if section.get("export")
        ),
    )
    yield "Decoding from packed codes", _decode(data.get("decode", {}))
    yield "Model", _pairs(data.get("model", {}))
    yield "Environment", _pairs(data.get("environment", {}))
    yield "Time", _pairs(data.get("timing", {}))


# Quality: one row for each model.


def _quality_rows(data: Mapping[str, Any]) -> Iterator[tuple[str, str, Any, Mapping[str, Any]]]:
    """Yields (recipe, method, stored bytes, summary) for every model of the report."""
    recipes = data.get("recipes", {})
    sizes = [section["float_bytes"] for section in recipes.values() if "float_bytes" in section]
    reference = data.get("float", {})
    if "bigram" in reference:
        yield "reference", "bigram", None, reference["bigram"]
    if "nll" in reference:
        yield "reference", "float", max(sizes, default=None), reference
    for recipe, section in recipes.items():
        for method, summary in _methods(recipe, section).items():
            stored = "float_bytes" if method == "float_control" else "bytes"
            yield recipe, method, section.get(stored), summary


def _methods(recipe: str, section: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    extra = section.get("cross_entropy", {})
    if extra and "methods" not in extra:
        given = ", ".join(extra)
        raise ValueError(f"recipes/{recipe}/cross_entropy: has {given}, expected 'methods'")
    return {**section.get("methods", {}), **extra.get("methods", {})}


def _quality(data: Mapping[str, Any]) -> str:
    rows, previous = [], None
    for recipe, method, size, summary in _quality_rows(data):
        if recipe != previous:
            span = len(COLUMNS) + 2
            rows.append(
                f'<tr class="group"><th colspan="{span}"><span>{escape(recipe)}</span></th></tr>'
            )
            previous = recipe
        cells = "".join(_cell(summary.get(key), form) for key, _, form in COLUMNS)
        style = ' class="ours"' if method.startswith("qat") else ""
        rows.append(
            f"<tr{style}><th>{_swatch(method)}{escape(plots.method_title(method))}</th>"
            f"<td>{_megabytes(size)}</td>{cells}</tr>"
        )
    if not rows:
        return ""
    headings = ["model", "MB", *(heading for _, heading, _ in COLUMNS)]
    return _table(headings, rows) + _quality_note(data)


def _quality_note(data: Mapping[str, Any]) -> str:
    notes = [
        "Loss gap: loss above the float model's on the same tokens. KL: of the model's "
        "distribution from the float model's, per token. Top-1 agreement: how often both put the "
        "same token first."
    ]
    measured = next((s for *_, s in _quality_rows(data) if "draws" in s), None)
    if measured:
        notes.append(
            f"Small figures are {measured['level']:.0%} intervals from {measured['draws']} "
            f"resamples of the {measured['documents']} held-out documents "
            f"({measured['tokens']:,} tokens), drawn whole and with the same draws for every model."
        )
    return "".join(f'<p class="note">{escape(note)}</p>' for note in notes)


# What training changed: paired differences and the share recovered.


def _changes(recipes: Mapping[str, Any]) -> str:
    differences, won = [], []
    for recipe, section in recipes.items():
        for part in (section, section.get("cross_entropy", {})):
            for name, difference in part.get("differences", {}).items():
                cells = "".join(_cell(difference.get(key), form) for key, _, form in DIFFERENCES)
                differences.append(
                    f"<tr><th>{escape(f'{recipe}: {_minus(name)}')}</th>{cells}</tr>"
                )
            for name, share in part.get("recovered", {}).items():
                cells = "".join(_percent_cell(share.get(key)) for key in ("loss_gap", "kl_mean"))
                words = f"{recipe}: of {plots.method_title(name)}"
                won.append(f"<tr><th>{escape(words)}</th>{cells}</tr>")
    body = ""
    if won:
        body += _table(["share won back", "of the loss gap", "of the mean KL"], won)
    if differences:
        body += _table(["difference", *(heading for _, heading, _ in DIFFERENCES)], differences)
        body += (
            '<p class="note">Differences are resampled in pairs: what makes a document hard for '
            "both models cancels. Those whose interval holds zero are shown in grey.</p>"
        )
    return body


def _minus(name: str) -> str:
    return " − ".join(plots.method_title(part) for part in name.split("-"))


def _percent_cell(estimate: Mapping[str, Any] | None) -> str:
    if estimate and estimate.get("value") is None:
        return f'<td class="unclear"><small>{escape(str(estimate.get("reason", "")))}</small></td>'
    return _cell(estimate, "{:.1f}%")


def _won(estimate: Mapping[str, Any], lost: str) -> str:
    value, low, high = (estimate[key] for key in ("value", "low", "high"))
    if high < 0:
        return f"made {lost} {-value:.0f}% ({-high:.0f} to {-low:.0f}) larger"
    share = f"{value:.0f}% ({low:.0f} to {high:.0f})"
    if low <= 0:
        return f"did not measurably win back {lost}, {share}"
    return f"wins back {share} of {lost}"


def _smaller(section: Mapping[str, Any]) -> str:
    if not section.get("bytes") or not section.get("float_bytes"):
        return ""
    return f", in {section['bytes'] / section['float_bytes']:.0%} of the bytes"


def _cards(data: Mapping[str, Any]) -> str:
    """Returns the few numbers to see first, for the first recipe that has a QAT model."""
    for recipe, section in data.get("recipes", {}).items():
        summary = section.get("methods", {}).get("qat")
        if summary is None:
            continue
        cards = []
        if section.get("bytes") and section.get("float_bytes"):
            ratio = section["float_bytes"] / section["bytes"]
            cards.append((f"{ratio:.2f}×", f"smaller as {recipe}"))
        for key, form, words in (
            ("top1_agreement", "{:.1%}", "same first choice as float"),
            ("kl_mean", "{:.3g}", "mean KL to float, nats"),
            ("bits_per_byte", "{:.3f}", "bits per byte, QAT"),
        ):
            if key in summary:
                cards.append((form.format(summary[key]["value"]), words))
        shown = "".join(f"<li><b>{escape(b)}</b>{escape(words)}</li>" for b, words in cards)
        return f'<ul class="cards">{shown}</ul>\n'
    return ""


# Figures.


def _figures(data: Mapping[str, Any]) -> str:
    drawn = "\n".join(
        f"<figure>{plots.inline_svg(svg, f'f{index}', caption)}<figcaption>{escape(caption)}</figcaption></figure>"
        for index, (svg, caption) in enumerate(_drawn(data))
    )
    return f'<div class="figures">{drawn}</div>' if drawn else ""


def _drawn(data: Mapping[str, Any]) -> Iterator[tuple[bytes, str]]:
    """Yields (SVG, caption) for every figure there is data for."""
    points = _points(data)
    if points:
        yield (
            plots.quality_against_bytes(points),
            "How far each model's predictions are from the float model's, against what it takes to "
            "store. Lower and further left is better; bars are intervals; recipes of about equal "
            "size stand side by side.",
        )
    if data.get("curves"):
        ylabel = str(data.get("curves_ylabel", "loss (nats per token)"))
        yield plots.loss_curves(data["curves"], ylabel), "Training, step by step."
    for caption, panel in data.get("curve_panels", {}).items():
        logx = bool(panel.get("logx", False))
        yield plots.loss_curves(panel["curves"], str(panel["ylabel"]), logx), caption
    if data.get("kl_histograms"):
        yield (
            plots.kl_histogram(data["kl_histograms"]),
            "Divergence token by token. A mean can hide a tail: what matters is that the whole hill moves left.",
        )


def _points(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    points, sizes = [], []
    for recipe, section in data.get("recipes", {}).items():
        for method, summary in section.get("methods", {}).items():
            if "bytes" in section and "kl_mean" in summary:
                kl = {"kl": summary["kl_mean"]["value"], **summary["kl_mean"]}
                label = f"{recipe} {method}"
                points.append(
                    {
                        "label": label,
                        "recipe": recipe,
                        "method": method,
                        "bytes": section["bytes"],
                        **kl,
                    }
                )
        sizes.append(section.get("float_bytes"))
    known = [size for size in sizes if size]
    if points and known:
        points.append(
            {"label": "float", "recipe": "", "method": "float", "bytes": max(known), "kl": 0.0}
        )
    return points


# What is stored.


def _coverage(recipe: str, section: Mapping[str, Any]) -> str:
    rows = section["coverage"]
    body = [
        f"<tr><th>{escape(str(row['site']))}</th><td>{escape(str(row['format']))}</td>"
        f"<td>{row.get('count', '')}</td><td>{row['bits']:.3f}</td><td>{row['bytes']:,.0f}</td>"
        f"<td>{row['share']:.1%}</td></tr>"
        for row in rows
    ]
    stored = section.get("bytes", sum(row["bytes"] for row in rows))
    whole = f"<b>{stored:,.0f}</b>"
    if section.get("float_bytes"):
        whole += f"<small>of {section['float_bytes']:,.0f} as float</small>"
    body.append(
        f"<tr class='total'><th>all</th><td></td><td></td><td></td><td>{whole}</td><td></td></tr>"
    )
    table = _table(["site", "format", "arrays", "bits/weight", "bytes", "share"], body)
    title = f"Bits per weight and share of the bytes, {recipe}"
    prefix = "c" + hashlib.sha256(recipe.encode()).hexdigest()[:6]
    svg = plots.inline_svg(plots.bits_per_site(rows), prefix, title)
    caption = f"<figcaption>{escape(title)}.</figcaption>"
    return f'<h3>{escape(recipe)}</h3>\n<figure class="wide">{svg}{caption}</figure>\n{table}'


def _decode(decode: Mapping[str, Any]) -> str:
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
    parts = (
        ("prompt", "Prompt"),
        ("packed_text", "Packed codes"),
        ("fake_quant_text", "As trained"),
    )
    return verdict + "".join(
        f"<h3>{words}</h3><pre>{escape(str(decode[key]))}</pre>"
        for key, words in parts
        if key in decode
    )


# Pieces of a page.


def _table(headings: Sequence[str], rows: Sequence[str]) -> str:
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = "\n".join(rows)
    return f'<div class="scroll"
    tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def _pairs(values: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<dt>{escape(key)}</dt><dd>{_value(value)}</dd>" for key, value in _flat(values)
    )
    return f"<dl>{rows}</dl>" if rows else ""


def _flat(values: Mapping[str, Any], before: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key} / ")
        else:
            yield f"{before}{key}", value


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return f'<span class="{"good" if value else "bad"}">{"yes" if value else "no"}</span>'
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.5g}"
    return escape(", ".join(map(str, value)) if isinstance(value, list) else str(value))


def _cell(estimate: Any, form: str) -> str:
    value, ends = _estimate(estimate, form)
    grey = isinstance(estimate, Mapping) and estimate.get("excludes_zero") is False
    style = ' class="unclear"' if grey else ""
    return f"<td{style}>{value}" + (f"<small>{ends}</small>" if ends else "") + "</td>"


def _estimate(estimate: Any, form: str) -> tuple[str, str]:
    """Returns (value, interval) as words; a bare number has no interval, a missing one is a
    dash."""
    if estimate is None:
        return "–", ""
    if not isinstance(estimate, Mapping):
        return form.format(estimate), ""
    if estimate.get("low") is None or estimate["low"] == estimate["high"]:
        return form.format(estimate["value"]), ""
    ends = (form.format(estimate[key]) for key in ("low", "high"))
    return form.format(estimate["value"]), "\u2009\u2026\u2009".join(ends)


def _megabytes(size: Any) -> str:
    return "–" if size is None else f"{size / 1e6:,.2f}"


def _swatch(method: str) -> str:
    colour = plots.COLOURS.get(method)
    return f'<i style="background:{colour}"></i>' if colour else "<i></i>"


def _replace(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        beside.write_text(text, encoding="utf-8", newline="\n")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


_CSS = """
:root { color-scheme: light dark; --page: #fbfbfa; --card: #ffffff; --ink: #24272e; --soft: #646b76;
  --line: #e3e4e6; --ours: #eef5fc; --good: #0b7a55; --bad: #b93a0a; }
@media (prefers-color-scheme: dark) { :root { --page: #14161a; --card: #1c1f25; --ink: #e6e7ea;
  --soft: #9aa1ac; --line: #31353d; --ours: #1d2a39; --good: #4cc796; --bad: #ff8a5c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 2.5rem 1.25rem 3rem; }
h1 { font-size: 1.15rem; font-weight: 600; color: var(--soft); margin: 0; }
.lead { font-size: clamp(1.35rem, 3.2vw, 2.1rem); line-height: 1.25; font-weight: 650;
  max-width: 46rem;
  margin: .5rem 0 1.5rem; letter-spacing: -.01em; }
.lead:empty { display: none; }
h2 { font-size: 1.2rem; margin: 2.75rem 0 .9rem; }
h3 { font-size: .95rem; margin: 1.5rem 0 .5rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem;
  padding: 0; margin: 0; list-style: none; }
.cards li, figure, .scroll, pre, dl { background: var(--card); border: 1px solid var(--line);
  border-radius: .6rem; }
.cards li { padding: .8rem 1rem; color: var(--soft); font-size: .85rem; }
.cards b { display: block; color: var(--ink); font-size: 1.5rem; line-height: 1.3;
  font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; margin: 0 0 .9rem; }
table { border-collapse: collapse; width: 100%; font-size: .86rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .5rem .55rem; text-align: right; white-space: nowrap; vertical-align: top; }
thead th { color: var(--soft); font-weight: 500; font-size: .78rem;
  border-bottom: 1px solid var(--line); }
tbody th { font-weight: 500; }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--card); }
tbody tr + tr > * { border-top: 1px solid var(--line); }
tr.group th { color: var(--soft); font-size: .78rem; padding-top: .9rem; }
tr.group th span { position: sticky; left: .8rem; }
tr.ours > * { background: var(--ours) !important; }
td small { display: block; color: var(--soft); font-size: .7rem; }
td.unclear, td.unclear small { color: var(--soft); }
td.unclear small { white-space: normal; min-width: 11rem; }
th i { display: inline-block; width: .65em; height: .65em; border-radius: 50%;
  margin-right: .55em; }
.note { color: var(--soft); font-size: .84rem; max-width: 52rem; margin: .4rem 0; }
.figures { display: grid;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); gap: 1rem; }
figure { margin: 0; padding: 1rem; }
figure.wide { max-width: 38rem; margin-bottom: .9rem; }
figure svg { display: block; width: 100%; height: auto; }
figcaption { color: var(--soft); font-size: .84rem; margin-top: .6rem; }
pre { padding: .9rem 1rem; margin: 0; overflow-x: auto; white-space: pre-wrap;
  overflow-wrap: anywhere;
  font-size: .84rem; }
dl { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; margin: 0;
  padding: .4rem 1rem;
  font-size: .86rem; }
dt, dd { margin: 0; padding: .3rem 0; }
dt { color: var(--soft); padding-right: 1.5rem; overflow-wrap: anywhere; }
dd { overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.good { color: var(--good); font-weight: 600; }
.bad { color: var(--bad); font-weight: 600; }
footer { margin-top: 3rem; color: var(--soft); font-size: .78rem; }
"""
