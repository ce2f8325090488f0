"""`gemma-qat evaluate --sensitivity`: which sites lose most, and a mixed recipe under a number of bytes."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def add_sensitivity(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of a sensitivity study."""
    group = parser.add_argument_group(
        "sensitivity", "KL that quantizing one class of sites of the float --reference adds, ranked; weights alone"
    )  # fmt: skip
    add = group.add_argument
    add("--sensitivity", action="store_true", help="measure --reference so, and no other model")
    add("--recipe", help="whose grids are measured (default: q4_0)")
    add("--method", help="rtn, mse or percentile, as in ptq (default: mse)")
    add("--by", help="what one class is: role, layer or site (default: role)")
    add("--parts", type=int, metavar="N", help="cut each role's layers into N ranges")
    add("--all-but-one", action="store_true",
        help="also what is won back by leaving each class in float; takes memory of a second model")  # fmt: skip
    add("--candidates", nargs="+", default=[], metavar="FORMAT[:TILE[:SCALE]]",
        help="formats to measure in place of the recipe's (with --budget: q8_0 q6_k q4_0, and float)")  # fmt: skip
    add("--budget", default="", metavar="BYTES",
        help="propose a mix of formats within 2.5GB, 700MB, or 0.3x of what bfloat16 takes")  # fmt: skip
    add("--propose", default="", metavar="FILE.json", help="write that mix as a recipe, which trains")  # fmt: skip
    add("--plot", metavar="FILE", help="bars of KL added beside bytes saved, .svg or .png")


_OTHERWISE = ("recipe", "method", "by", "parts")
"""Arguments that `SensitivityConfig` has a default for."""


def refuse_alone(arguments: argparse.Namespace) -> None:
    """Refuses what only a sensitivity study acts on.

    Raises: InputError.
    """
    from gemma_qat.errors import InputError

    for name in (*_OTHERWISE, "all_but_one", "candidates", "budget", "propose", "plot"):
        if getattr(arguments, name):
            hint = "; MODEL+RECIPE is a model on a recipe's grid" if name == "recipe" else ""
            raise InputError(f"--{name.replace('_', '-')} goes with --sensitivity{hint}")


def run(arguments: argparse.Namespace, config: Any) -> int:
    """Measures, and prints a row per class and what is proposed."""
    from gemma_qat import api
    from gemma_qat.cli.console import keep_json, progress, writable
    from gemma_qat.cli.evaluate import text_and_tokenizer
    from gemma_qat.errors import InputError
    from gemma_qat.evals.plot_sensitivity import sensitivity_bars
    from gemma_qat.mixing import refuse

    if arguments.models or arguments.own:
        raise InputError("--sensitivity measures --reference alone: leave models and --own out")
    if arguments.tasks:
        raise InputError("--sensitivity measures on --text: leave --tasks out")
    writable(arguments.json)
    writable(arguments.plot)
    form = Path(arguments.plot or "x.svg").suffix.removeprefix(".")
    if form not in ("svg", "png"):
        raise InputError(f"--plot {arguments.plot}: a name that ends in .svg or .png expected")
    how = api.SensitivityConfig(
        **{name: getattr(arguments, name) for name in _OTHERWISE if getattr(arguments, name) is not None},
        all_but_one=arguments.all_but_one, candidates=tuple(arguments.candidates),
        budget=arguments.budget, propose=arguments.propose,
    )  # fmt: skip
    refuse(arguments.reference, how)
    text, tokenizer = text_and_tokenizer(arguments)
    with progress() as report:
        found = api.sensitivity(arguments.reference, text, tokenizer, how, config, report)
    keep_json(arguments.json, found)
    if arguments.plot:
        Path(arguments.plot).write_bytes(sensitivity_bars(found["rows"], form))
    _print(found, arguments.propose)
    return 0


def _print(found: Mapping[str, Any], file: str) -> None:
    from rich.console import Console

    console = Console(width=None if Console().is_terminal else 140, highlight=False)
    for warning in found["text"]["warnings"]:
        console.print(f"warning: {warning}", soft_wrap=True)
    console.print(_rows(found))
    text, lines = found["text"], []
    if "whole" in found:
        whole = found["whole"]
        lines.append(
            f"{whole['recipe']} at every site: {whole['bytes'] / 1e6:,.2f} MB, KL {_estimate(whole['kl_mean'])}, "
            f"same top {whole['top1_agreement']['value']:.2%}; the rows add up to {whole['sum_of_rows']:.6f}"
        )
    lines.append(
        f"{text['documents']} documents, {text['tokens']:,} tokens; codes by {found['method']}; in brackets 95 % of "
        "resamples of the documents"
    )
    if found["rounds_activations"]:
        lines.append(
            "weights alone: the recipe's rounding of activations, keys, values is left out"
        )
    for line in lines:
        console.print(line, soft_wrap=True)
    if "proposal" in found:
        _print_proposal(console, found["proposal"], file)


def _rows(found: Mapping[str, Any]) -> Any:
    rows = found["rows"]
    restored = any("restored" in row for row in rows)
    names = ["class", "format", "sites", "weights", "saved, MB", "KL added, nats/token", "share"]
    names += ["same top", "KL per MB"]
    table = _table([*names, *(["won back alone in float"] if restored else [])])
    for row in rows:
        per_mb, share = row["kl_per_mb"], row["share"]
        cells = [
            row["class"], row["format"], str(row["sites"]), f"{row['weights']:,}", f"{row['saved'] / 1e6:,.3f}",
            _estimate(row["kl_mean"], "\n"), "" if share is None else f"{share:.1%}",
            f"{row['top1_agreement']['value']:.2%}", "" if per_mb is None else f"{per_mb:.3g}",
        ]  # fmt: skip
        table.add_row(*cells, *([_estimate(row["restored"], "\n")] if restored else []))
    return table


def _print_proposal(console: Any, proposal: Mapping[str, Any], file: str) -> None:
    table = _table(["class", "format", "MB", "KL alone"])
    for one in proposal["chosen"]:
        table.add_row(one["class"], one["format"], f"{one['bytes'] / 1e6:,.3f}", f"{one['kl']:.6f}")
    console.print(table)
    lines = [
        f"proposed: {proposal['bytes'] / 1e6:,.3f} MB of {proposal['budget'] / 1e6:,.3f} "
        f"({proposal['bytes'] / proposal['float_bytes']:.3f} of bfloat16)",
        f"KL predicted {proposal['predicted']:.6f} (effects taken to add up), measured "
        f"{_estimate(proposal['kl_mean'])}, same top {proposal['top1_agreement']['value']:.2%}",
    ]
    if file:
        lines.append(f"{file}: written; gemma-qat train CONFIG recipe={file}")
    for line in lines:
        console.print(line, soft_wrap=True)


def _estimate(estimate: Mapping[str, float], between: str = " ") -> str:
    return f"{estimate['value']:.6f}{between}\\[{estimate['low']:.6f}, {estimate['high']:.6f}]"


def _table(headings: list[str]) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if index < 2 else "right", overflow="fold")
    return table
