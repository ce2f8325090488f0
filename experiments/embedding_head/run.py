"""Where the loss of q4_0 comes from, and what a head of more bits costs and wins: see README.md."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.study import (
    Result,
    Scale,
    Study,
    Twin,
    bars,
    each,
    estimates,
    from_twin,
    said,
    swept,
    table,
    twins,
)
from gemma_qat.config import PtqCell, TrainCell
from gemma_qat.evals import TokenRecords
from gemma_qat.evals.variants import Variants
from gemma_qat.models import Fitted, declare, fit, size_named
from gemma_qat.numerics import Grid
from gemma_qat.quant import coverage, total_bytes
from gemma_qat.quant.recipe_json import read_recipe

FOLDER = Path(__file__).resolve().parent
SIZE = "tiny_e2b"
PARTS = {
    "look-up": ("embed",),
    "head": ("head",),
    "attention": ("attn_q", "attn_k", "attn_v", "attn_o"),
    "feed-forward": ("ffn_gate", "ffn_up", "ffn_down"),
    "per-layer table": ("per_layer_embed",),
    "per-layer branch": ("per_layer_gate", "per_layer_projection"),
}
"""Roles of each part. The head is the embedding again, put on its grid apart from it."""

ENDS = {"q4_0": "q4_0", "q8_0": str(FOLDER / "ends_q8_0.json"), "float": str(FOLDER / "ends_float.json")}  # fmt: skip
"""Recipes by what the tied table is stored in; everything else is Q4_0."""


def measure(scale: Scale) -> Result:
    """Returns the divergence of every part alone and of all but it, of tables of more bits, and after training."""
    kept: dict[str, list[TokenRecords]] = {}
    trained: dict[str, Result] = {}
    for number, twin in enumerate(twins(SIZE, scale)):
        for name, records in _parts(twin).items():
            kept.setdefault(name, []).append(records)
        trained[f"twin {number}"] = swept(f"embedding_head_{number}", _cells(twin, scale), twin, scale)  # fmt: skip
    found = {name: estimates(records, scale) for name, records in kept.items()}
    return {
        "weights": _weights(),
        "alone": {name: found[f"alone {name}"] for name in PARTS},
        "all but": {name: found[f"all but {name}"] for name in PARTS},
        "all": found["all"], "both ends": found["both ends"],
        "trained": trained, "bytes of e2b": {name: _bytes_of_e2b(name) for name in _FORMATS},
    }  # fmt: skip


def _untied() -> Fitted:
    rules = read_recipe(FOLDER / "untied.json")
    return fit(size_named(SIZE), rules)


def _parts(twin: Twin) -> dict[str, TokenRecords]:
    """Returns the records with each part alone on Q4_0, all but it, both ends, and all."""
    fitted = _untied()
    variants = Variants.of(twin.model, fitted.config, "mse")
    declared = declare(fitted.config)
    grids = {path: plan.weight for path, plan in fitted.plans.items()}
    of_part = {
        name: {path: grid for path, grid in grids.items() if declared[path].role in roles}
        for name, roles in PARTS.items()
    }
    chosen: dict[str, Mapping[str, Grid]] = {"all": grids}
    chosen["both ends"] = of_part["look-up"] | of_part["head"]
    for name, mine in of_part.items():
        chosen[f"alone {name}"] = mine
        chosen[f"all but {name}"] = {path: grids[path] for path in grids.keys() - mine.keys()}
    return {name: twin.records(variants.on(mine)) for name, mine in chosen.items()}


def _cells(twin: Twin, scale: Scale) -> list[PtqCell | TrainCell]:
    cells: list[PtqCell | TrainCell] = []
    for name, recipe in ENDS.items():
        config = from_twin(twin, recipe, scale.steps(200))
        cells += [
            PtqCell(name=f"{name}-mse", config=config, method="mse"),
            TrainCell(name=f"{name}-qat", config=config),
        ]
    return cells


def _weights() -> dict[str, int]:
    declared = declare(_untied().config).values()
    return {
        name: sum(parameter.size for parameter in declared if parameter.role in roles)
        for name, roles in PARTS.items()
    }


_FORMATS: dict[str, Grid | None] = {
    "q4_0": Grid(format="q4_0"), "q6_k": Grid(format="q6_k"), "q8_0": Grid(format="q8_0"), "float": None,
}  # fmt: skip


def _bytes_of_e2b(name: str) -> float:
    """Returns the bytes of E2B on Q4_0 with its tied table in a format; computed from shapes."""
    fitted = fit(size_named("e2b"), "q4_0")
    plans = dict(fitted.plans)
    if (grid := _FORMATS[name]) is None:
        del plans["embed/table"]
    else:
        plans["embed/table"] = dataclasses.replace(plans["embed/table"], weight=grid)
    return total_bytes(coverage(declare(fitted.config).values(), plans))


def tables(result: Result) -> str:
    """Returns the tables of the README."""
    whole = result["all"]["kl_mean"]["value"]
    rows = []
    for name, alone in result["alone"].items():
        left = result["all but"][name]["kl_mean"]["value"]
        value = alone["kl_mean"]
        rows.append(
            [name, f"{result['weights'][name]:,}", said(value), f"{value['value'] / whole:.0%}",
             f"{1 - left / whole:.0%}", each(alone)]
        )  # fmt: skip
    for name, title in (("both ends", "look-up and head (the tied table)"), ("all", "everything")):
        value = result[name]["kl_mean"]
        share = f"{value['value'] / whole:.0%}"
        rows.append([title, "", said(value), share, "", each(result[name])])
    total = sum(alone["kl_mean"]["value"] for alone in result["alone"].values())
    rows.append(["the parts added up", "", f"{total:.4f}", f"{total / whole:.0%}", "", ""])
    headings = ("on Q4_0", "weights", "KL alone", "of everything's", "won back alone in float")
    return "\n\n".join((table((*headings, "each twin"), rows), _trained(result)))


def _trained(result: Result) -> str:
    every = list(result["trained"].values())
    rows = []
    for name in ENDS:
        mse, qat = (
            [found[f"{name}-{how}"]["kl_mean"]["value"] for found in every] for how in ("mse", "qat")
        )  # fmt: skip
        size = result["bytes of e2b"][name]
        rows.append(
            [name, f"{every[0][f'{name}-qat']['bytes'] / 1e3:,.0f}", _mean(mse), _mean(qat),
             f"{1 - sum(qat) / sum(mse):.0%}", f"{size / 1e9:.3f}"]
        )  # fmt: skip
    size = result["bytes of e2b"]["q6_k"]
    rows.insert(1, ["q6_k (does not fit here)", "", "", "", "", f"{size / 1e9:.3f}"])
    headings = ("tied table", "kB here", "KL, least squares", "KL, QAT", "won by QAT", "GB of E2B")
    return table(headings, rows)


def _mean(values: list[float]) -> str:
    return f"{sum(values) / len(values):.4f} ({', '.join(f'{value:.4f}' for value in values)})"


def plot(result: Result) -> bytes:
    """Returns bars of every part, alone and as what is won back."""
    whole = result["all"]["kl_mean"]["value"]
    rows: list[Any] = [
        (
            name,
            {
                "alone on Q4_0": alone["kl_mean"],
                "won back, alone in float": whole - result["all but"][name]["kl_mean"]["value"],
            },
        )
        for name, alone in result["alone"].items()
    ]
    return bars(rows, "KL to the float model (nats per token)")


if __name__ == "__main__":
    Study(folder=FOLDER, measure=measure, tables=tables, plot=plot).main()
