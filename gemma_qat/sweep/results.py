"""What a sweep found, in one document of plain values.

    kind          "sweep"
    name, text, environment    as in an evaluation
    reference     name, path, bytes, summary
    cells         {NAME: {recipe, method, seed, needs, path, state, step, and of those measured bytes, float_bytes,
                  summary}}
    groups        {NAME: {recipe, method, kind ("ptq", "trained"), loss, cells, seeds, bytes, float_bytes, summary,
                  over_seeds, cost, control}}: cells that differ by their seed alone; `summary` is of all their tokens,
                  `over_seeds` {STATISTIC: mean, deviation, least, most} of their own summaries, `cost` as in `cost.py`,
                  `control` the group trained in float alike, with the same optimizer on as much text, if there is one
    differences   {"A-B": paired differences} of every two groups of one recipe, and of one of them and a float control
    recovered     {A: {B: share of what PTQ B lost that A has}}, of one recipe; of loss none where A learns the text
    against_best  {A: {kl_mean, loss_gap: {ptq, difference, recovered}}}: trained A against the PTQ of its recipe with
                  the least of it. That is chosen on the text that is measured, which favours PTQ
    failed        {NAME: why}

Seeds are put together by document: a file's sums are over its tokens in every seed, so a mean over tokens is a mean
over seeds, and an interval says how it would vary with other files. How it varies with the seed is `deviation`. In a
pair, the one with fewer seeds is counted as often as it takes to be as many, file against the same file.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gemma_qat.config import Cell, ExperimentConfig, PtqCell
from gemma_qat.evals import Resamples, TokenRecords, paired_difference, recovered, summarize
from gemma_qat.sweep.cost import cost_of
from gemma_qat.sweep.marks import states
from gemma_qat.sweep.measure import Measure
from gemma_qat.sweep.plan import Plan

COMPARED = {"kl_mean": "kl_mean", "loss_gap": "nll"}
"""What trained groups are compared with PTQ by, and what its paired difference is called: losses differ as gaps do."""
_LEARNED = {"value": None, "low": None, "high": None, "reason": "cross-entropy learns the text"}
"""Share of a loss gap where less loss is not what was won back from rounding."""
OVER_SEEDS = ("kl_mean", "loss_gap", "perplexity_ratio", "bits_per_byte", "top1_agreement")


def collect(plan: Plan, measure: Measure, failed: Mapping[str, str]) -> dict[str, Any]:
    """Returns the document above, of the cells that are done and measured; empty of figures when there are none."""
    found = states(plan)
    kept = [n for n in plan.measured if found[n].kind == "done" and measure.is_kept(n)]
    evaluations = {name: measure.evaluation(name) for name in kept}
    document: dict[str, Any] = {
        "kind": "sweep",
        "name": plan.sweep.name,
        "cells": {
            name: _about(plan.cells[name].cell)
            | {"needs": list(plan.cells[name].needs), "path": str(plan.cells[name].folder)}
            | {"state": found[name].kind, "step": found[name].step}
            | _figures(name, evaluations.get(name))
            for name in plan.cells
        },
        "failed": dict(failed),
        "groups": {}, "differences": {}, "recovered": {}, "against_best": {},
    }  # fmt: skip
    if not kept:
        return document
    first = evaluations[kept[0]]
    document |= {key: first[key] for key in ("text", "environment", "reference")}
    groups = _groups(plan, kept)
    records = {name: [measure.records(cell) for cell in cells] for name, cells in groups.items()}
    draws = Resamples(
        next(iter(records.values()))[0].documents, seed=0, draws=plan.sweep.evaluation.draws
    )
    for name, cells in groups.items():
        document["groups"][name] = _group(plan, cells, evaluations) | {
            "summary": summarize(together(records[name]), draws)
        }
        control = _control(plan, cells, groups)
        if control:
            document["groups"][name]["control"] = control
    for a, b in _pairs(plan, groups):
        one, other = as_often(records[a], records[b])
        document["differences"][f"{a}-{b}"] = paired_difference(one, other, draws)
    for a, b in itertools.permutations(groups, 2):
        ours, theirs = (plan.cells[groups[name][0]].cell for name in (a, b))
        if isinstance(theirs, PtqCell) and ours.config.recipe == theirs.config.recipe:
            won, lost = as_often(records[a], records[b])
            shares = recovered(won, lost, draws)
            if learns_the_text(document["groups"][a]):
                shares["loss_gap"] = _LEARNED
            document["recovered"].setdefault(a, {})[b] = shares
    document["against_best"] = _against_best(document)
    return document


def _against_best(document: Mapping[str, Any]) -> dict[str, Any]:
    groups = document["groups"]
    found: dict[str, Any] = {}
    for name, group in groups.items():
        ptq = [
            other
            for other, one in groups.items()
            if one["kind"] == "ptq" and one["recipe"] == group["recipe"]
        ]
        if group["kind"] == "ptq" or not ptq:
            continue
        found[name] = {}
        for statistic, of_difference in COMPARED.items():
            best = min(ptq, key=lambda one: groups[one]["summary"][statistic]["value"])
            found[name][statistic] = {
                "ptq": best,
                "difference": document["differences"][f"{name}-{best}"][of_difference],
                "recovered": document["recovered"][name][best][statistic],
            }
    return found


def together(records: Sequence[TokenRecords]) -> TokenRecords:
    """Returns the tokens of several models on the same documents as one model's; bytes count as often."""
    joined = {
        field.name: np.concatenate([getattr(one, field.name) for one in records])
        for field in dataclasses.fields(TokenRecords)
    }
    return TokenRecords(**joined | {"document_bytes": len(records) * records[0].document_bytes})


def as_often(
    a: Sequence[TokenRecords], b: Sequence[TokenRecords]
) -> tuple[TokenRecords, TokenRecords]:
    """Returns both put together, each repeated until there are as many of one as of the other."""
    times = math.lcm(len(a), len(b))
    return together([*a] * (times // len(a))), together([*b] * (times // len(b)))


def _about(cell: Cell) -> dict[str, Any]:
    return {
        "recipe": cell.config.recipe,
        "method": cell.label,
        "seed": cell.config.train.seed,
    }


def _figures(name: str, evaluation: dict[str, Any] | None) -> dict[str, Any]:
    if evaluation is None:
        return {}
    model = evaluation["models"][name]
    return {key: model[key] for key in ("bytes", "float_bytes", "summary")}


def _groups(plan: Plan, names: Sequence[str]) -> dict[str, list[str]]:
    """Returns the cells that differ by their seed alone, by what is unique of their recipe and method."""
    by_digest: dict[str, list[str]] = {}
    for name in names:
        by_digest.setdefault(plan.cells[name].group, []).append(name)
    short = [_short(plan.cells[cells[0]].cell) for cells in by_digest.values()]
    return {
        said if short.count(said) == 1 else cells[0]: cells
        for said, cells in zip(short, by_digest.values(), strict=True)
    }


def _short(cell: Cell) -> str:
    return f"{cell.config.recipe}/{cell.label}"


def _group(
    plan: Plan, cells: Sequence[str], evaluations: Mapping[str, dict[str, Any]]
) -> dict[str, Any]:
    first = plan.cells[cells[0]].cell
    figures = [_figures(name, evaluations[name]) for name in cells]
    group = {
        "recipe": first.config.recipe, "method": first.label,
        "kind": "ptq" if isinstance(first, PtqCell) else "trained", "cells": list(cells),
        "seeds": [plan.cells[name].cell.config.train.seed for name in cells],
        "bytes": figures[0]["bytes"], "float_bytes": figures[0]["float_bytes"],
        "cost": cost_of(plan, cells),
    }  # fmt: skip
    if group["kind"] == "trained":
        group["loss"] = first.config.train.loss
    if len(cells) > 1:
        group["over_seeds"] = {
            key: _spread([one["summary"][key]["value"] for one in figures]) for key in OVER_SEEDS
        }
    return group


def _control(plan: Plan, cells: Sequence[str], groups: Mapping[str, Sequence[str]]) -> str | None:
    """Returns the group that trained on in float as these trained on a grid."""
    ours = plan.cells[cells[0]].cell
    if _is_ptq(plan, cells) or ours.config.recipe == "float":
        return None
    for name, others in groups.items():
        config = plan.cells[others[0]].cell.config
        if config.recipe == "float" and config.start and _how(config) == _how(ours.config):
            return name
    return None


def learns_the_text(group: Mapping[str, Any]) -> bool:
    """Whether less loss of a group may be what it learned on the way, and not what was lost to rounding."""
    return bool(group.get("loss") == "ce")


def _how(config: ExperimentConfig) -> tuple[Any, ...]:
    return config.start, config.optimizer, config.train.steps, config.train.batch_size, config.data


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {
        "mean": float(np.mean(values)), "deviation": float(np.std(values, ddof=1)),
        "least": min(values), "most": max(values),
    }  # fmt: skip


def _pairs(plan: Plan, groups: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, str]]:
    recipes = {name: plan.cells[cells[0]].cell.config.recipe for name, cells in groups.items()}
    # What was trained comes first, so that less is better: qat-mse, qat_ce-float_control.
    ranked = sorted(
        groups, key=lambda name: (recipes[name] == "float", _is_ptq(plan, groups[name]))
    )
    for a, b in itertools.combinations(ranked, 2):
        if recipes[a] == recipes[b] or recipes[b] == "float":
            yield a, b


def _is_ptq(plan: Plan, cells: Sequence[str]) -> bool:
    return isinstance(plan.cells[cells[0]].cell, PtqCell)
