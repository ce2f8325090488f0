"""A sweep's document as a table for the console, a Markdown page and the points of a plot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from gemma_qat.evals.results import megabytes
from gemma_qat.sweep.tables import NOTE, inline, recipe_tables, table, words

_COLUMNS = (
    ("kl_mean", "KL mean, nats", "{:#.4g}"),
    ("loss_gap", "loss gap, nats", "{:+.4f}"),
    ("top1_agreement", "same top", "{:.2%}"),
    ("bits_per_byte", "bits/byte", "{:.4f}"),
)
_HEADINGS = (
    "recipe", "method", "seeds", "MB", *(title for _, title, _ in _COLUMNS),
    "KL over seeds", "of PTQ's KL won back",
)  # fmt: skip


def console_table(document: Mapping[str, Any]) -> Any:
    """Returns the table of groups as a `rich.table.Table`, intervals below the values."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(str(document["name"]), style="bold"), title_justify="left",
                  box=SIMPLE_HEAD, padding=(0, 1, 0, 0))  # fmt: skip
    for index, heading in enumerate(_HEADINGS):
        table.add_column(heading, justify="left" if index < 2 else "right", overflow="fold")
    for row in _rows(document):
        table.add_row(
            *(Text.assemble(value, (f"\n{ends}" if ends else "", "dim")) for value, ends in row)
        )
    return table


def markdown(document: Mapping[str, Any]) -> str:
    """Returns a table per recipe, the differences of what was trained and what is not there, as a page in Markdown."""
    lines = [f"# {document['name']}", ""]
    if "text" in document:
        text = document["text"]
        draws = document["reference"]["summary"]["draws"]
        lines += [
            f"{text['documents']} documents, {text['tokens']:,} tokens in rows of {text['length']}, against "
            f"{document['reference']['name']}. In brackets 95 % of {draws} resamples of the documents.", "",
        ]  # fmt: skip
        lines += [*recipe_tables(document), NOTE]
        lines += ["", "![every method on every recipe](methods.png)", "",
                  "![mean KL against stored size](sweep.png)", ""]  # fmt: skip
    differences = list(_differences(document))
    if differences:
        lines += [
            "## Paired differences",
            "",
            "Of what was trained; every other pair is in sweep.json.",
            "",
        ]
        lines += [*table(("difference", *(title for _, title, _ in _DIFFERENCES)), differences), ""]
    for name, cell in document["cells"].items():
        why = document["failed"].get(name, "")
        if why or cell["state"] != "done":
            lines.append(f"- {name}: {cell['state']}{': ' if why else ''}{why}")
    return "\n".join(lines).rstrip() + "\n"


def points(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns what `evals.quality_against_bytes` draws: the groups, and the reference at its size."""
    found = [
        {
            "label": name, "recipe": group["recipe"], "method": group["method"],
            "bytes": group["bytes"], "kl": group["summary"]["kl_mean"]["value"],
            "low": group["summary"]["kl_mean"]["low"], "high": group["summary"]["kl_mean"]["high"],
        }
        for name, group in document["groups"].items()
    ]  # fmt: skip
    size = document["reference"]["bytes"]
    own = {"label": "float", "recipe": "float", "method": "float", "bytes": size}
    return [*found, own | {"kl": 0.0, "low": 0.0, "high": 0.0}]


_DIFFERENCES = (
    ("kl_mean", "KL mean", "{:+#.3g}"),
    ("nll", "loss, nats/token", "{:+.4f}"),
    ("top1_agreement", "same top", "{:+.2%}"),
)


def _rows(document: Mapping[str, Any]) -> Iterator[list[tuple[str, str]]]:
    """Yields a row of (value, interval) for every group, those of a recipe together."""
    groups = document["groups"]
    recipes = list(dict.fromkeys(group["recipe"] for group in groups.values()))
    short = [f"{group['recipe']}/{group['method']}" for group in groups.values()]
    for name in sorted(groups, key=lambda name: recipes.index(groups[name]["recipe"])):
        group = groups[name]
        is_alone = short.count(f"{group['recipe']}/{group['method']}") == 1
        plain = (
            group["recipe"], group["method"] if is_alone else f"{group['method']} ({name})",
            str(len(group["cells"])), megabytes(group["bytes"]),
        )  # fmt: skip
        yield [
            *((text, "") for text in plain),
            *(words(group["summary"][key], form) for key, _, form in _COLUMNS),
            (_over_seeds(group), ""),
            _won_back(name, document),
        ]


def _over_seeds(group: Mapping[str, Any]) -> str:
    spread = group.get("over_seeds")
    return (
        f"{spread['kl_mean']['mean']:#.4g} ± {spread['kl_mean']['deviation']:#.2g}"
        if spread
        else "–"
    )


def _won_back(name: str, document: Mapping[str, Any]) -> tuple[str, str]:
    """Returns the share against the best PTQ of the recipe; a dash for PTQ itself."""
    if name not in document["against_best"]:
        return "–", ""
    best = document["against_best"][name]["kl_mean"]
    if best["recovered"]["value"] is None:
        return "–", best["recovered"]["reason"]
    value, ends = words(best["recovered"], "{:.0f} %")
    return value, f"{ends} {document['groups'][best['ptq']]['method']}".strip()


def _differences(document: Mapping[str, Any]) -> Iterator[list[str]]:
    groups = document["groups"]
    trained = [name for name, group in groups.items() if group["kind"] == "trained"]
    pairs = [f"{a}-{b}" for a in trained for b in trained]
    for pair, estimates in document["differences"].items():
        if pair in pairs:
            yield [
                pair,
                *(
                    inline(words(estimates[key], form))
                    + ("" if estimates[key]["excludes_zero"] else " (holds 0)")
                    for key, _, form in _DIFFERENCES
                ),
            ]
