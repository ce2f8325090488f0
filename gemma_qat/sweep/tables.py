"""A sweep's tables in Markdown: a recipe each, and what training won back of every PTQ.

Both the whole document and its figures alone (`figures.py`) have all that is read here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gemma_qat.evals.results import estimate_text, megabytes
from gemma_qat.sweep.results import learns_the_text

Group = Mapping[str, Any]
_SHARES = {"loss_gap": "loss gap", "kl_mean": "KL"}

NOTE = (
    "*Best PTQ* is the PTQ of the recipe with the least KL, or loss gap, on this very text: chosen where it is "
    "measured, it looks a little better than it is, so what training wins is understated. *Ahead*, *behind*: the "
    "interval of the paired difference to it excludes 0. *Beside its control*: the loss less that of the float model "
    "trained on as long with the same optimizer. Cross-entropy goes on learning the text: its loss gap says nothing of "
    "rounding, this does. *Tokens* are trained on; those in brackets only looked at, to calibrate."
)


def recipe_tables(document: Mapping[str, Any]) -> list[str]:
    """Returns the lines of all tables: of every recipe its methods, PTQ first, then what was won back of each PTQ."""
    groups = document["groups"]
    lines: list[str] = []
    for recipe in dict.fromkeys(group["recipe"] for group in groups.values()):
        own = {name: group for name, group in groups.items() if group["recipe"] == recipe}
        ranked = dict(sorted(own.items(), key=lambda item: item[1]["kind"] != "ptq"))
        size = megabytes(next(iter(own.values()))["bytes"])
        lines += [f"### {recipe}, {size} MB", "", *_methods(ranked, document), ""]
        won = _won_back(ranked, document)
        if won:
            lines += ["KL / loss gap won back of each PTQ, %:", "", *won, ""]
    return lines


def over_recipes(
    document: Mapping[str, Any], method: str, against: Sequence[str] = ("rtn", "gptq")
) -> list[str]:
    """Returns the lines of a table of one trained method: what it won back on every recipe, and if it is ahead.

    Raises: KeyError for a document without the method.
    """
    groups = document["groups"]
    named = {
        (group["recipe"], group["method"]): name for name, group in groups.items() if group["seeds"]
    }
    own = [(recipe, name) for (recipe, said), name in named.items() if said == method]
    if not own:
        raise KeyError(method)
    columns = [(other, key) for other in against for key in _SHARES]
    headings = [f"{_SHARES[key]} of {other}, %" for other, key in columns]
    rows = []
    for recipe, name in own:
        row = [recipe]
        for other, key in columns:
            share = document["recovered"].get(name, {}).get(named.get((recipe, other), ""), {})
            row.append(_share(share[key]) if share else "–")
        rows.append([*row, *(_against(name, key, document) for key in _SHARES)])
    best = [f"{said} of the best PTQ" for said in _SHARES.values()]
    return table(["recipe", *headings, *best], rows)


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns the lines of a table in Markdown."""
    return ["| " + " | ".join(line) + " |" for line in [headings, ["---"] * len(headings), *rows]]


def words(estimate: Mapping[str, Any], form: str) -> tuple[str, str]:
    """Returns (value, interval in brackets) of an estimate."""
    value, ends = estimate_text(estimate, form)
    return value, f"[{ends}]".replace("\u2009\u2026\u2009", ", ") if ends else ""


def inline(cell: tuple[str, str]) -> str:
    """Returns a value and its interval on one line."""
    return " ".join(part for part in cell if part)


def distinct(groups: Mapping[str, Group]) -> dict[str, str]:
    """Returns what a table calls the groups of a recipe: the method, with its name where two have the same."""
    methods = [group["method"] for group in groups.values()]
    return {
        name: group["method"] if methods.count(group["method"]) == 1 else f"{group['method']} ({name})"
        for name, group in groups.items()
    }  # fmt: skip


def _methods(groups: Mapping[str, Group], document: Mapping[str, Any]) -> list[str]:
    compared = any(name in document["against_best"] for name in groups)
    controlled = any(_control(group) for group in groups.values())
    headings = ["method", "seeds", "KL mean, nats", "loss gap, nats", "same top"]
    headings += ["KL won back of best PTQ", "gap won back of best PTQ"] if compared else []
    headings += ["loss beside its control"] if controlled else []
    called = distinct(groups)
    rows = [
        [
            called[name], _seeds(group),
            *(
                inline(words(group["summary"][key], form))
                for key, form in (("kl_mean", "{:#.3g}"), ("loss_gap", "{:+.4f}"))
            ),
            words(group["summary"]["top1_agreement"], "{:.1%}")[0],
            *(_against(name, key, document) for key in ("kl_mean", "loss_gap") if compared),
            *([_beside(name, group, document)] if controlled else []),
            _tokens(group["cost"]),
        ]
        for name, group in groups.items()
    ]  # fmt: skip
    return table([*headings, "tokens"], rows)


def _control(group: Group) -> str:
    """The control of a group whose loss says nothing without."""
    return group.get("control", "") if learns_the_text(group) else ""


def _beside(name: str, group: Group, document: Mapping[str, Any]) -> str:
    pair = document["differences"].get(f"{name}-{_control(group)}")
    return inline(words(pair["nll"], "{:+.4f}")) if pair else "–"


def _seeds(group: Group) -> str:
    return str(len(group["seeds"]))


def _against(name: str, key: str, document: Mapping[str, Any]) -> str:
    if name not in document["against_best"]:
        return "–"
    if key == "loss_gap" and learns_the_text(document["groups"][name]):
        return "learns the text"
    found = document["against_best"][name][key]
    method = document["groups"][found["ptq"]]["method"]
    difference = found["difference"]
    where = "not apart"
    if difference["excludes_zero"]:
        where = "ahead" if difference["high"] < 0 else "behind"
    if found["recovered"]["value"] is None:
        return f"nothing to win back of {method}; {where}"
    return f"{_share(found['recovered'])} % of {method}, {where}"


def _share(share: Mapping[str, Any]) -> str:
    return "–" if share["value"] is None else inline(words(share, "{:.0f}"))


def _tokens(cost: Mapping[str, Any]) -> str:
    looked_at = f"({cost['calibration_tokens']:,})" if cost["calibration_tokens"] else ""
    tokens = f"{cost['tokens']:,}" if cost["tokens"] else ""
    return f"{tokens} {looked_at}".strip() or "0"


def _won_back(groups: Mapping[str, Group], document: Mapping[str, Any]) -> list[str]:
    ptq = [name for name, group in groups.items() if group["kind"] == "ptq"]
    trained = [name for name, group in groups.items() if group["kind"] == "trained"]
    if not ptq or not trained:
        return []
    called = distinct(groups)
    rows = [[called[name], *_shares(document["recovered"][name], ptq)] for name in trained]
    return table(["", *(called[name] for name in ptq)], rows)


def _shares(won: Mapping[str, Any], ptq: Sequence[str]) -> Iterator[str]:
    for other in ptq:
        shares = (won[other][key]["value"] for key in ("kl_mean", "loss_gap"))
        yield " / ".join("–" if share is None else f"{share:.0f}" for share in shares)
