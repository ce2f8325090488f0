"""The report as one HTML page: inline styles, inline figures, nothing to load.

The schema of `data` is in `report.py`; what a page is built of in `page_parts.py`, its tables of quality in
`page_quality.py`, those of runs in `page_runs.py`, its figures in `figures.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from gemma_qat.evals import page_parts as parts
from gemma_qat.evals.figure import GRID, QUALITY, SPEED, TRAINING
from gemma_qat.evals.figures import figures_of
from gemma_qat.evals.page_quality import cards, changes, evaluation_section, recipe_quality
from gemma_qat.evals.page_runs import coverage, decode, exports, speed, trained
from gemma_qat.evals.results import figures_digest, headline
from gemma_qat.evals.style import CSS


def html_page(data: Mapping[str, Any]) -> str:
    """Returns the whole page: inline styles, inline figures, every text escaped, nothing to
    load."""
    title = escape(str(data.get("title", "Report")))
    lead = escape(str(data.get("headline") or headline(data)))
    shown = [(heading, body) for heading, body in _sections(data, _drawn(data)) if body]
    sections = "\n".join(
        f'<section id="s{number}"><h2>{heading}</h2>\n{body}\n</section>'
        for number, (heading, body) in enumerate(shown)
    )
    links = "".join(
        f'<a href="#s{number}">{heading}</a>' for number, (heading, _) in enumerate(shown)
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        f'<header><h1>{title}</h1>\n<p class="lead">{lead}</p>\n{cards(data)}</header>\n'
        f"<nav>{links}</nav>\n{sections}\n<footer>{_footer(data)}</footer>\n</main>\n</body>\n</html>\n"
    )


def _footer(data: Mapping[str, Any]) -> str:
    words = (
        f"Figures {figures_digest(data)[:16]}: two runs with the same digest measured the same numbers. "
        "report.json, beside this page, holds every number that is shown."
    )
    if data.get("left_aside"):
        words += f" Left aside: {', '.join(map(str, data['left_aside']))}."
    return escape(words)


def _drawn(data: Mapping[str, Any]) -> dict[str, list[str]]:
    """The figures as markup, by the part of the page where they stand."""
    found: dict[str, list[str]] = {}
    for number, figure in enumerate(figures_of(data)):
        markup = parts.figure(figure.draw("svg"), figure.caption, f"f{number}")
        found.setdefault(figure.part, []).append(markup)
    return found


def _sections(
    data: Mapping[str, Any], drawn: Mapping[str, Sequence[str]]
) -> Iterator[tuple[str, str]]:
    """Yields (heading, body) in the order of the page; an empty body is left out."""
    recipes, runs = data.get("recipes", {}), data.get("runs", {})

    def figures(part: str) -> str:
        return parts.figures(drawn.get(part, ()))

    yield "Quality on held-out text", recipe_quality(data)
    yield "What training changed", changes(recipes)
    yield "Quality in figures", figures(QUALITY)
    found = data.get("evaluations", [])
    for number, evaluation in enumerate(found):
        heading = "Quality" if len(found) == 1 else f"Quality, {number + 1} of {len(found)}"
        yield heading, evaluation_section(evaluation, figures(f"{QUALITY}{number}"))
    yield "What was trained", trained(runs)
    yield "Training", figures(TRAINING)
    yield "Inside the grid", figures(GRID)
    yield "What is stored, and how", coverage(recipes, runs, drawn)
    yield "Speed", figures(SPEED) + speed(data.get("benches", {}), runs)
    yield "Export, read back and compared", exports(recipes, runs)
    yield "Decoding from packed codes", decode(data.get("decode", {}))
    yield "Model", parts.pairs(data.get("model", {}))
    yield "Environment", parts.pairs(data.get("environment", {}))
    yield "Time", parts.pairs(data.get("timing", {}))
