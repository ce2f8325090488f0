"""What the report page is built of: tables that scroll inside, lists of pairs, cells with intervals, figures."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from gemma_qat.evals import plots
from gemma_qat.evals.results import estimate_text


def table(headings: Sequence[str], rows: Sequence[str], style: str = "") -> str:
    """Returns a table that scrolls inside its frame; `rows` are ready markup, headings are text."""
    head = "".join(f"<th>{breakable(heading)}</th>" for heading in headings)
    body = "\n".join(rows)
    inside = f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"
    return f'<div class="scroll{style and " " + style}" tabindex="0">{inside}</div>'


def folded(words: str, body: str) -> str:
    """Returns a part of the page that opens when its words are chosen."""
    return f"<details><summary>{escape(words)}</summary>{body}</details>"


def breakable(text: str) -> str:
    """Returns text as markup that a narrow column breaks at its dots, dashes and slashes before it breaks words."""
    return re.sub(r"([._/-])(?=[A-Za-z_])", r"\1<wbr>", escape(text))


def note(text: str) -> str:
    """Returns a paragraph of explanation."""
    return f'<p class="note">{escape(text)}</p>'


def figure(svg: bytes, caption: str, prefix: str) -> str:
    """Returns a figure with its caption; `prefix` keeps its element names apart from all others of the page."""
    drawn = plots.inline_svg(svg, prefix, caption)
    return f"<figure>{drawn}<figcaption>{escape(caption)}</figcaption></figure>"


def figures(drawn: Sequence[str]) -> str:
    """Returns figures side by side where there is room."""
    return f'<div class="figures">{"".join(drawn)}</div>' if drawn else ""


def pairs(values: Mapping[str, Any]) -> str:
    """Returns a list of keys and values, nested ones by their path."""
    rows = "".join(
        f"<dt>{escape(key)}</dt><dd>{value_words(value, key)}</dd>"
        for key, value in flat(values, " / ")
    )
    return f"<dl>{rows}</dl>" if rows else ""


def side_by_side(columns: Mapping[str, Mapping[str, Any]], first: Sequence[str] = ()) -> str:
    """Returns a table of settings, a column each: those in `first` and those that differ, then the rest folded away.

    Nested settings are named by their path with dots, as on the command line.
    """
    found = {name: dict(flat(values, ".")) for name, values in columns.items()}
    keys = list(dict.fromkeys(key for values in found.values() for key in values))
    differ = [key for key in keys if len({str(values.get(key)) for values in found.values()}) > 1]
    shown = list(dict.fromkeys([key for key in first if key in keys] + differ))
    if not shown:
        shown = keys
    rest = [key for key in keys if key not in shown]

    def rows(keys: Sequence[str]) -> list[str]:
        return [_setting(key, found, key in differ) for key in keys]

    headings = ["", *found]
    body = table(headings, rows(shown), "settings") if shown else ""
    if rest:
        words = f"{len(rest)} more, the same in all" if len(found) > 1 else f"{len(rest)} more"
        body += folded(words, table(headings, rows(rest), "settings"))
    return body


def _setting(key: str, found: Mapping[str, Mapping[str, Any]], differs: bool) -> str:
    cells = "".join(
        f'<td class="words">{value_words(values[key], key) if key in values else "–"}</td>'
        for values in found.values()
    )
    style = ' class="ours"' if differs and len(found) > 1 else ""
    return f"<tr{style}><th>{breakable(key)}</th>{cells}</tr>"


def flat(values: Mapping[str, Any], between: str, before: str = "") -> Iterable[tuple[str, Any]]:
    """Yields (path, value) of everything that is not a mapping itself."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, between, f"{before}{key}{between}")
        else:
            yield f"{before}{key}", value


def value_words(value: Any, key: str = "") -> str:
    """Returns a value as markup: yes and no, digits in groups; of what should be none, 0 is good and more is not."""
    if isinstance(value, bool):
        return f'<span class="{"good" if value else "bad"}">{"yes" if value else "no"}</span>'
    if isinstance(value, int):
        style = ""
        if re.search(r"differing|changed_files", key):
            style = f' class="{"bad" if value else "good"}"'
        return f"<span{style}>{value:,}</span>" if style else f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.5g}"
    if isinstance(value, list):
        return escape("; ".join(map(_words, value)) or "none")
    return escape("–" if value is None or value == "" else str(value))


def _words(item: Any) -> str:
    """One of a list: `key value, key value` of a mapping."""
    if isinstance(item, Mapping):
        return ", ".join(f"{key} {value}" for key, value in item.items())
    return str(item)


def cell(estimate: Any, form: str) -> str:
    """Returns a cell with a value above its interval; grey where a difference is not told from zero."""
    value, ends = estimate_text(estimate, form)
    grey = isinstance(estimate, Mapping) and estimate.get("excludes_zero") is False
    style = ' class="unclear"' if grey else ""
    return f"<td{style}>{value}" + (f"<small>{ends}</small>" if ends else "") + "</td>"


def percent_cell(estimate: Mapping[str, Any] | None) -> str:
    """Returns a cell of percent; where there is none, why."""
    if estimate and estimate.get("value") is None:
        return f'<td class="unclear"><small>{escape(str(estimate.get("reason", "")))}</small></td>'
    return cell(estimate, "{:.1f}%")


def swatch(colour: str | None) -> str:
    """Returns a dot in the colour that figures draw something in."""
    return f'<i style="background:{colour}"></i>' if colour else "<i></i>"
