"""The page's tables of quality: how far each model is from its reference, and what training changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from gemma_qat.evals import page_parts as parts
from gemma_qat.evals import plots
from gemma_qat.evals.evaluations import recovered
from gemma_qat.evals.figures import model_styles
from gemma_qat.evals.page_tasks import tasks_section
from gemma_qat.evals.results import (
    DIFFERENCES,
    MAIN_COLUMNS,
    TAIL_COLUMNS,
    best_model,
    megabytes,
    quality_rows,
)

SHOWN = 10
"""Rows of a long table that are not folded away."""

Columns = Sequence[tuple[str, str, str]]


def recipe_quality(data: Mapping[str, Any]) -> str:
    """Returns the table of every model of every recipe, as the quickstart measures them."""
    found = list(quality_rows(data))
    if not found:
        return ""
    columns = _held([*MAIN_COLUMNS, *TAIL_COLUMNS], [summary for *_, summary in found])
    rows: list[str] = []
    previous = None
    for recipe, method, size, summary in found:
        if recipe != previous:
            rows.append(_group(recipe, len(columns) + 2))
            previous = recipe
        cells = "".join(parts.cell(summary.get(key), form) for key, _, form in columns)
        style = ' class="ours"' if method.startswith("qat") else ""
        rows.append(
            f"<tr{style}><th>{parts.swatch(plots.COLOURS.get(method))}{escape(plots.method_title(method))}</th>"
            f"<td>{megabytes(size)}</td>{cells}</tr>"
        )
    headings = ["model", "MB", *(heading for _, heading, _ in columns)]
    return parts.table(headings, rows) + _notes(columns, [summary for *_, summary in found])


def evaluation_section(evaluation: Mapping[str, Any], figures: str) -> str:
    """Returns tables and figures of one evaluation: text, quality, tails, own models, differences, categories."""
    body = _text(evaluation["text"]) + _quality(evaluation) + figures
    tail = _tail(evaluation)
    if tail:
        body += f"<h3>Tails and shifts</h3>\n{tail}"
    own = _own(evaluation["models"])
    if own:
        body += f"<h3>Against each one's own fake-quantized model</h3>\n{own}"
    if "tasks" in evaluation:
        body += tasks_section(evaluation["tasks"])
    body += _differences(evaluation) + _categories(evaluation["models"])
    return body


def _text(text: Mapping[str, Any]) -> str:
    words = [
        f"{text['documents']:,} documents" if "documents" in text else "",
        f"{text['tokens']:,} tokens" if "tokens" in text else "",
        f"rows of {text['length']:,} tokens" if text.get("length") else "",
        f"as {text['format']}" if text.get("format") else "",
        f"digest {str(text['digest'])[:16]}" if text.get("digest") else "",
    ]
    line = f'<p class="facts">{escape(" · ".join(filter(None, words)))}</p>'
    warnings = "".join(f'<p class="warning">{escape(str(w))}</p>' for w in text.get("warnings", []))
    return line + warnings


def _quality(evaluation: Mapping[str, Any]) -> str:
    reference, models = evaluation["reference"], evaluation["models"]
    styles, won = model_styles(evaluation), recovered(evaluation)
    summaries = [reference["summary"], *(model["summary"] for model in models.values())]
    columns = _held(MAIN_COLUMNS, summaries[1:])
    rows = [
        f"<tr><th>{parts.swatch(plots.COLOURS['float'])}{escape(str(reference.get('name', 'reference')))}"
        f"<small>reference{_recipe(reference)}</small></th>{_size(reference)}"
        f"{'<td>–</td>' if won else ''}{_cells(reference['summary'], columns, reference=True)}</tr>"
    ]
    for name, model in models.items():
        style = ' class="ours"' if name in won else ""
        rows.append(
            f"<tr{style}>{_head(name, str(model.get('recipe', '')), styles[name]['color'])}"
            f"{_size(model)}{_won(won.get(name)) if won else ''}{_cells(model['summary'], columns)}</tr>"
        )
    headings = [
        "model",
        "MB",
        *(["% recovered"] if won else []),
        *(words for _, words, _ in columns),
    ]
    notes = _notes(columns, summaries)
    if won:
        notes += parts.note(
            "% recovered: of the mean KL that the untrained rounding of the same recipe costs, the share that training "
            "won back; without an interval where the evaluation holds none."
        )
    return parts.table(headings, rows) + notes


def _head(name: str, below: str, colour: str | None = None) -> str:
    dot = parts.swatch(colour) if colour else ""
    return f"<th>{dot}{parts.breakable(name)}<small>{escape(below)}</small></th>"


def _recipe(reference: Mapping[str, Any]) -> str:
    return f", {escape(str(reference['recipe']))}" if reference.get("recipe") else ""


def _size(model: Mapping[str, Any]) -> str:
    size, whole = model.get("bytes"), model.get("float_bytes")
    share = f"<small>{size / whole:.0%} of float</small>" if size and whole and size < whole else ""
    return f"<td>{megabytes(size)}{share}</td>"


def _won(won: Mapping[str, Any] | None) -> str:
    for versus, share in (won or {}).items():
        if "kl_mean" in share:
            found = parts.percent_cell(share["kl_mean"])
            return found.replace("</td>", f"<small>of {escape(versus)}</small></td>")
    return "<td>–</td>"


def _cells(summary: Mapping[str, Any], columns: Columns, reference: bool = False) -> str:
    """Cells of a row; a reference has no distance from itself."""
    own = ("nll", "perplexity", "bits_per_byte")
    return "".join(
        parts.cell(None if reference and key not in own else summary.get(key), form)
        for key, _, form in columns
    )


def _tail(evaluation: Mapping[str, Any]) -> str:
    models, styles = evaluation["models"], model_styles(evaluation)
    columns = _held(TAIL_COLUMNS, [model["summary"] for model in models.values()])
    rows = [
        f"<tr><th>{parts.swatch(styles[name]['color'])}{parts.breakable(name)}</th>"
        f"{_cells(model['summary'], columns)}</tr>"
        for name, model in models.items()
    ]
    if not columns:
        return ""
    words = "KL of one token, in nats: the median, what 90, 99 and 99.9 % of tokens stay below, the largest."
    if any(key in ("rms_shift", "mean_shift") for key, *_ in columns):
        words += (
            " Shift of p: of the probability of the true token, model less reference "
            "(RMS Δp and mean Δp of llama.cpp)."
        )
    return parts.table(["model", *(heading for _, heading, _ in columns)], rows) + parts.note(words)


def _own(models: Mapping[str, Any]) -> str:
    held = {name: model["own"] for name, model in models.items() if "own" in model}
    wanted = ("kl_mean", "top1_agreement", "perplexity_ratio", "kl_max")
    named = {column[0]: column for column in (*MAIN_COLUMNS, *TAIL_COLUMNS)}
    columns = _held([named[key] for key in wanted], [own["summary"] for own in held.values()])
    rows = [
        f"<tr>{_head(name, str(own.get('name', '')))}{_cells(own['summary'], columns)}</tr>"
        for name, own in held.items()
    ]
    if not rows:
        return ""
    return parts.table(["model", *(words for _, words, _ in columns)], rows) + parts.note(
        "What is deployed beside what was trained: here anything but zero is a difference between the two programs."
    )


def changes(recipes: Mapping[str, Any]) -> str:
    """Returns what QAT won back of each recipe's loss, and paired differences, as the quickstart measures them."""
    differences: dict[str, Any] = {}
    won = []
    for recipe, section in recipes.items():
        for part in (section, section.get("cross_entropy", {})):
            for name, difference in part.get("differences", {}).items():
                differences[f"{recipe}: {_minus(name)}"] = difference
            for name, share in part.get("recovered", {}).items():
                cells = "".join(
                    parts.percent_cell(share.get(key)) for key in ("loss_gap", "kl_mean")
                )
                words = f"{recipe}: of {plots.method_title(name)}"
                won.append(f"<tr><th>{parts.breakable(words)}</th>{cells}</tr>")
    body = ""
    if won:
        body += parts.table(["share won back", "of the loss gap", "of the mean KL"], won)
    return body + _difference_table(differences)


def _differences(evaluation: Mapping[str, Any]) -> str:
    """Paired differences: those within a recipe first; of many, the others folded away."""
    models = evaluation["models"]
    near: dict[str, Any] = {}
    far: dict[str, Any] = {}
    for first, second, found in _pairs(evaluation):
        same = models[first].get("recipe") == models[second].get("recipe")
        (near if same else far)[f"{first} − {second}"] = found
    if len(near) + len(far) <= SHOWN or not near:
        body = _difference_table(near | far)
    else:
        body = _difference_table(near)
        if far:
            body += parts.folded(f"{len(far)} across recipes", _difference_table(far))
    return f"<h3>Differences</h3>\n{body}" if body else ""


def _pairs(evaluation: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Yields (A, B, difference) of "A-B", whatever hyphens A and B have themselves."""
    names = list(evaluation["models"])
    for key, found in evaluation.get("differences", {}).items():
        for first in names:
            if key.startswith(f"{first}-") and key[len(first) + 1 :] in names:
                yield first, key[len(first) + 1 :], found
                break


def _difference_table(differences: Mapping[str, Any]) -> str:
    if not differences:
        return ""
    columns = _held(DIFFERENCES, list(differences.values()))
    rows = [
        f"<tr><th>{parts.breakable(words)}</th>{_cells(found, columns)}</tr>"
        for words, found in differences.items()
    ]
    table = parts.table(["difference", *(words for _, words, _ in columns)], rows)
    return table + parts.note(
        "Differences are resampled in pairs: what makes a document hard for "
        "both models cancels. Those whose interval holds zero are shown in grey."
    )


def _minus(name: str) -> str:
    return " − ".join(plots.method_title(part) for part in name.split("-"))


def _categories(models: Mapping[str, Any]) -> str:
    names = list(dict.fromkeys(name for m in models.values() for name in m.get("categories", {})))
    if not names:
        return ""
    held = [row for m in models.values() for row in m.get("categories", {}).values()]
    columns = _held(MAIN_COLUMNS, held)
    rows: list[str] = []
    for name in names:
        rows.append(_group(name, len(columns) + 3))
        for model, found in models.items():
            row = found.get("categories", {}).get(name)
            if row is not None:
                counts = "".join(
                    f"<td>{_count(row.get(key))}</td>" for key in ("documents", "tokens")
                )
                rows.append(
                    f"<tr><th>{parts.breakable(model)}</th>{counts}{_cells(row, columns)}</tr>"
                )
    headings = ["category and model", "documents", "tokens", *(words for _, words, _ in columns)]
    table = parts.table(headings, rows)
    if len(rows) > SHOWN:
        table = parts.folded(f"{len(names)} categories, {len(models)} models", table)
    return f"<h3>By category of text</h3>\n{table}"


def _count(number: Any) -> str:
    return "–" if number is None else f"{number:,}"


def _group(words: str, span: int) -> str:
    return f'<tr class="group"><th colspan="{span}"><span>{escape(words)}</span></th></tr>'


def _held(columns: Columns, summaries: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """The columns that any summary has a value for."""
    return [column for column in columns if any(column[0] in summary for summary in summaries)]


def _notes(columns: Columns, summaries: Sequence[Mapping[str, Any]]) -> str:
    """What the columns mean, and where the intervals come from."""
    meanings = " ".join(MEANINGS[key] for key, *_ in columns if key in MEANINGS)
    body = parts.note(meanings) if meanings else ""
    measured = next((summary for summary in summaries if "draws" in summary), None)
    if measured:
        body += parts.note(
            f"Small figures are {measured['level']:.0%} intervals from {measured['draws']} "
            f"resamples of the {measured['documents']} held-out documents "
            f"({measured['tokens']:,} tokens), drawn whole and with the same draws for every model."
        )
    return body


MEANINGS = {
    "kl_mean": "KL: of the model's distribution from the reference's, per token.",
    "top1_agreement": "Same top: how often both put the same token first.",
    "perplexity_ratio": "Perplexity ratio: the model's over the reference's.",
    "loss_gap": "Loss gap: loss above the reference's on the same tokens.",
}


def cards(data: Mapping[str, Any]) -> str:
    """Returns the few numbers to see first, of the model that the headline is about."""
    shown = "".join(f"<li><b>{escape(b)}</b>{escape(words)}</li>" for b, words in _cards(data))
    return f'<ul class="cards">{shown}</ul>\n' if shown else ""


def _cards(data: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for recipe, section in data.get("recipes", {}).items():
        summary = section.get("methods", {}).get("qat")
        if summary is not None:
            yield from _numbers(section, summary, f"smaller as {recipe}", "float")
            return
    found = best_model(data)
    if found is not None:
        _, model, reference = found
        yield from _numbers(
            model, model["summary"], f"smaller as {model.get('recipe', '')}", reference
        )


def _numbers(
    size: Mapping[str, Any], summary: Mapping[str, Any], smaller: str, reference: str
) -> Iterator[tuple[str, str]]:
    if size.get("bytes") and size.get("float_bytes") and size["bytes"] < size["float_bytes"]:
        yield f"{size['float_bytes'] / size['bytes']:.2f}×", smaller.removesuffix(" as ")
    for key, form, words in (
        ("top1_agreement", "{:.1%}", f"same first choice as {reference}"),
        ("kl_mean", "{:.3g}", f"mean KL to {reference}, nats"),
        ("perplexity_ratio", "{:.4f}", f"perplexity over {reference}'s"),
        ("bits_per_byte", "{:.3f}", "bits per byte"),
    ):
        if key in summary:
            yield (
                form.format(
                    summary[key]["value"] if isinstance(summary[key], Mapping) else summary[key]
                ),
                words,
            )
