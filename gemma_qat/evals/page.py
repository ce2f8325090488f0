"""The report as one HTML page: inline styles, inline figures, nothing to load.

The schema of `data` is in `report.py`. The file is long because a page is: tables, notes and styles are read together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

from gemma_qat.evals import plots
from gemma_qat.evals.results import (
    COLUMNS,
    DIFFERENCES,
    estimate_text,
    figures_digest,
    headline,
    megabytes,
    quality_rows,
)
from gemma_qat.evals.style import CSS


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
        f"<title>{title}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
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


def _quality(data: Mapping[str, Any]) -> str:
    rows, previous = [], None
    for recipe, method, size, summary in quality_rows(data):
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
            f"<td>{megabytes(size)}</td>{cells}</tr>"
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
    measured = next((s for *_, s in quality_rows(data) if "draws" in s), None)
    if measured:
        notes.append(
            f"Small figures are {measured['level']:.0%} intervals from {measured['draws']} "
            f"resamples of the {measured['documents']} held-out documents "
            f"({measured['tokens']:,} tokens), drawn whole and with the same draws for every model."
        )
    return "".join(f'<p class="note">{escape(note)}</p>' for note in notes)


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


def _table(headings: Sequence[str], rows: Sequence[str]) -> str:
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = "\n".join(rows)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"
    return f'<div class="scroll" tabindex="0">{table}</div>'


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
    value, ends = estimate_text(estimate, form)
    grey = isinstance(estimate, Mapping) and estimate.get("excludes_zero") is False
    style = ' class="unclear"' if grey else ""
    return f"<td{style}>{value}" + (f"<small>{ends}</small>" if ends else "") + "</td>"


def _swatch(method: str) -> str:
    colour = plots.COLOURS.get(method)
    return f'<i style="background:{colour}"></i>' if colour else "<i></i>"
