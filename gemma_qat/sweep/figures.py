"""What of a sweep's document is worth keeping beside a text: `figures.json`, small enough to be committed.

    kind            "sweep_figures"
    name, environment    as in the document
    text            documents, tokens, length
    draws           of the bootstrap
    reference       name, size, bytes, nll, bits_per_byte
    groups          {NAME: {recipe, method, kind, loss, seeds, bytes, summary, over_seeds, cost, control}}
    differences     {"A-B"} of two trained groups, and of one and a float control
    recovered       {A: {B: share}} of trained A
    against_best    as in the document

Estimates are kept of the statistics in `KEPT` alone; no cell, no path. Numbers have six digits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

KEPT = ("kl_mean", "loss_gap", "nll", "top1_agreement", "bits_per_byte")


def figures_of(document: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the figures of a sweep's document that has groups."""
    groups, reference = document["groups"], document["reference"]
    trained = [name for name, group in groups.items() if group["kind"] == "trained"]
    found = {
        "kind": "sweep_figures",
        "name": document["name"],
        "environment": document["environment"],
        "text": {key: document["text"][key] for key in ("documents", "tokens", "length")},
        "draws": reference["summary"]["draws"],
        "reference": {key: reference[key] for key in ("name", "size", "bytes")}
        | {key: reference["summary"][key] for key in ("nll", "bits_per_byte")},
        "groups": {name: _group(group) for name, group in groups.items()},
        "differences": {
            f"{a}-{b}": _kept(document["differences"][f"{a}-{b}"])
            for a in trained
            for b in trained
            if f"{a}-{b}" in document["differences"]
        },
        "recovered": {a: document["recovered"][a] for a in trained if a in document["recovered"]},
        "against_best": document["against_best"],
    }
    kept: dict[str, Any] = rounded(found)
    return kept


def _group(group: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("recipe", "method", "kind", "loss", "seeds", "bytes", "cost", "control", "over_seeds")
    found = {key: group[key] for key in keys if key in group}
    return found | {"summary": _kept(group["summary"])}


def _kept(estimates: Mapping[str, Any]) -> dict[str, Any]:
    return {key: estimates[key] for key in KEPT if key in estimates}


def rounded(value: Any) -> Any:
    """Returns plain values with floats of six digits: more than any of them is good for."""
    if isinstance(value, Mapping):
        return {str(name): rounded(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(one) for one in value]
    if isinstance(value, float | np.floating):
        return float(f"{float(value):.6g}")
    return int(value) if isinstance(value, np.integer) else value
