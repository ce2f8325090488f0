"""4-bit experts of a width that wide tiles do not divide: where the loss is, what repairs it: see README.md."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments.router.forced import routed
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
from gemma_qat.config import Cell, PtqCell, TrainCell
from gemma_qat.evals import TokenRecords
from gemma_qat.evals.variants import Variants
from gemma_qat.models import Gemma4, ModelConfig, declare, size_named
from gemma_qat.numerics import Grid, mse_search, quantize
from gemma_qat.ptq import METHODS
from gemma_qat.quant.sites import EXPERTS

FOLDER = Path(__file__).resolve().parent
STEPS = 600
EVEN = size_named("tiny_26b_a4b")
assert EVEN.experts is not None
ODD = dataclasses.replace(
    EVEN, name="tiny_26b_a4b_96", experts=dataclasses.replace(EVEN.experts, width=96)
)
"""Experts of width 96, 1.5 tiles of 64 as 704 is 5.5 of 128; those of `EVEN` are one tile of 64."""

Q4_0 = Grid(format="q4_0")
PARTS = {"gate": "expert_gate", "up": "expert_up", "down": "expert_down"}
TILES = (8, 16, 32, 48, 64)
"""Along the inputs of the down-projection; where one does not divide the width, its last tile is short, or padded."""
REPAIRS: Mapping[str, tuple[str, str, dict[str, Any]]] = {
    "round to nearest": ("experts_q4_0", "rtn", {}),
    "least squares": ("experts_q4_0", "mse", {}),
    "least squares by importance": (
        "experts_q4_0",
        "mse",
        {"ptq": {"importance": True}, "calibration": {"batches": 32}},
    ),
    "AWQ": ("experts_q4_0", "awq", {"calibration": {"batches": 32}}),
    "GPTQ, 16 rows": ("experts_q4_0", "gptq", {"calibration": {"batches": 2}}),
    "GPTQ, 256 rows": ("experts_q4_0", "gptq", {"calibration": {"batches": 32}}),
    "least squares, down at 8 bits": ("experts_down8", "mse", {}),
    "QAT, 200 steps": ("experts_q4_0", "qat", {}),
    "QAT, experts alone": ("experts_q4_0", "qat", {"train": {"only": ("*/experts/*",)}}),
    "QAT, a third of the rate": ("experts_q4_0", "qat", {"optimizer": {"learning_rate": 1e-4}}),
    "QAT, a tenth of the rate": ("experts_q4_0", "qat", {"optimizer": {"learning_rate": 3e-5}}),
}
"""What is done to experts on Q4_0: recipe, method, and what of its config is another; text is 256 rows unless said."""


def measure(scale: Scale) -> Result:
    """Returns the divergence by what of the experts is rounded, and after each repair, at both widths."""
    return {str(_width(size)): _of(size, scale) for size in (EVEN, ODD)}


def _width(size: ModelConfig) -> int:
    assert size.experts is not None
    return size.experts.width


def _of(size: ModelConfig, scale: Scale) -> Result:
    kept: dict[str, list[TokenRecords]] = {}
    repaired, shares = [], []
    for number, twin in enumerate(twins(size, scale, STEPS)):
        found, share = _variants(twin)
        for name, records in found.items():
            kept.setdefault(name, []).append(records)
        shares.append(share)
        name = f"moe_experts_{_width(size)}_{number}"
        repaired.append(swept(name, _cells(twin, scale), twin, scale))
    return {
        "kl": {name: estimates(records, scale) for name, records in kept.items()},
        "busy": shares, "repaired": repaired,
    }  # fmt: skip


def _variants(twin: Twin) -> tuple[dict[str, TokenRecords], float]:
    """Returns the records of every variant, and the share of token-expert pairs that the busy half has."""
    declared = declare(twin.model.config)
    variants = Variants.of(twin.model, twin.model.config, "mse")
    sites = {path: one for path, one in declared.items() if one.is_site and one.role != "router"}
    experts = {path: Q4_0 for path, one in sites.items() if one.role in EXPERTS}
    chosen: dict[str, dict[str, Grid]] = {
        "everything": dict.fromkeys(sites, Q4_0),
        "everything else": {path: Q4_0 for path in sites if path not in experts},
        "experts": experts,
    }
    for name, role in PARTS.items():
        chosen[name] = {path: Q4_0 for path in experts if declared[path].role == role}
    for layer in range(twin.model.config.layers):
        chosen[f"layer {layer}"] = {p: Q4_0 for p in experts if declared[p].layer == layer}
    chosen["down, int4 per channel"] = dict.fromkeys(chosen["down"], Grid(format="int4"))
    found = {name: twin.records(variants.on(grids)) for name, grids in chosen.items()}
    for tile in TILES:
        found[f"down, int4 in tiles of {tile}"] = twin.records(
            _in_tiles(twin.model, chosen["down"], tile)
        )
    busy, share = _busy(twin)
    whole = variants.on(experts).parameters()
    for name, mask in (("busy half", busy), ("rare half", {k: ~m for k, m in busy.items()})):
        found[name] = twin.records(_some(twin.model, whole, mask))
    return found, share


def _in_tiles(model: Gemma4, paths: Iterable[str], tile: int) -> Gemma4:
    """Returns the float model with kernels [E, R, O] on int4 in tiles along R, the last one filled up with zeros.

    Zeros move neither the largest weight of a tile nor its least squares: a padded tile is a short one.
    """
    parameters, grid = dict(model.parameters()), Grid(format="int4", tile=tile)
    for path in paths:
        leaf = parameters[path]
        wide = jnp.pad(leaf, ((0, 0), (0, -leaf.shape[1] % tile), (0, 0)))
        on_grid = quantize(wide, grid, (1,), mse_search(wide, grid, (1,))).dequantize()
        parameters[path] = on_grid[:, : leaf.shape[1]].astype(leaf.dtype)
    return Gemma4.from_parameters(model.config, parameters, None, model.options)


def _busy(twin: Twin) -> tuple[dict[int, np.ndarray], float]:
    """Returns of every layer which experts are the busier half on training rows, bool [E], and their share."""
    shape = twin.model.config.experts
    assert shape is not None
    counts = np.zeros((twin.model.config.layers, shape.count))
    for batch in twin.batches(8):
        valid = batch["segments"] > 0
        for layer, (went, _) in enumerate(routed(twin.model, batch)[1]):
            counts[layer] += np.bincount(np.asarray(went)[valid].ravel(), minlength=shape.count)
    order = np.argsort(np.argsort(-counts, axis=1), axis=1)
    busy = order < shape.count // 2
    return dict(enumerate(busy)), float(counts[busy].sum() / counts.sum())


def _some(
    model: Gemma4, whole: Mapping[str, Any], experts: Mapping[int, np.ndarray]
) -> Gemma4:  # fmt: skip
    """Returns the float model with some experts of every layer as they are in `whole`."""
    parameters, declared = dict(model.parameters()), declare(model.config)
    for path, leaf in parameters.items():
        one = declared[path]
        if one.role in EXPERTS and one.layer is not None:
            mask = jnp.asarray(experts[one.layer])[:, None, None]
            parameters[path] = jnp.where(mask, whole[path], leaf)
    return Gemma4.from_parameters(model.config, parameters, None, model.options)


def _cells(twin: Twin, scale: Scale) -> list[Cell]:
    cells: list[Cell] = []
    for name, (recipe, method, options) in REPAIRS.items():
        config = from_twin(twin, str(FOLDER / f"{recipe}.json"), scale.steps(200))
        for part, changes in options.items():
            changed = dataclasses.replace(getattr(config, part), **changes)
            config = dataclasses.replace(config, **{part: changed})
        cell = _name(name)
        if method == "qat":
            cells.append(TrainCell(name=cell, config=config))
        elif method in METHODS:
            cells.append(PtqCell(name=cell, config=config, method=method))
    return cells


def _name(title: str) -> str:
    return title.replace(",", "").replace(" ", "_")


def tables(result: Result) -> str:
    """Returns the tables of the README."""
    return "\n\n".join((_where(result), _repaired(result)))


def _where(result: Result) -> str:
    names = list(dict.fromkeys(name for found in result.values() for name in found["kl"]))
    rows = []
    for name in names:
        cells = [found["kl"].get(name) for found in result.values()]
        rows.append([_title(name, result), *(_figure(one) for one in cells)])
    return table(("on Q4_0", *(f"KL, width {width} (each twin)" for width in result)), rows)


def _title(name: str, result: Result) -> str:
    if name not in ("busy half", "rare half"):
        return f"experts: {name}" if name in PARTS or name.startswith("layer") else name
    busy = [np.mean(found["busy"]) for found in result.values()]
    shares = (f"{share if name == 'busy half' else 1 - share:.0%}" for share in busy)
    return f"the {name} of each layer's experts, {' and '.join(shares)} of what is routed"


def _figure(one: Result | None) -> str:
    return "–" if one is None else f"{said(one['kl_mean'])} ({each(one)})"


def _repaired(result: Result) -> str:
    rows = []
    for title in REPAIRS:
        cells = []
        for found in result.values():
            values, base = (_values(found, one) for one in (title, "least squares"))
            each_twin = ", ".join(f"{value:.4f}" for value in values)
            cells += [each_twin, f"{1 - sum(values) / sum(base):+.0%}"] if values else ["–", "–"]
        rows.append([title, *cells])
    headings = [part for width in result for part in (f"KL, width {width}", "less than least squares")]  # fmt: skip
    return table(("experts on Q4_0, all else float", *headings), rows)


def _values(found: Result, title: str) -> list[float]:
    """Returns the divergence with each twin; none of a method that was not there."""
    name = _name(title)
    return [one[name]["kl_mean"]["value"] for one in found["repaired"] if name in one]


def plot(result: Result) -> bytes:
    """Returns bars of what is rounded, at both widths."""
    names = list(dict.fromkeys(name for found in result.values() for name in found["kl"]))
    rows: list[Any] = [
        (
            name,
            {
                f"width {width}": found["kl"][name]["kl_mean"]
                for width, found in result.items()
                if name in found["kl"]
            },
        )
        for name in names
    ]
    return bars(rows, "KL to the float model (nats per token)")


if __name__ == "__main__":
    Study(folder=FOLDER, measure=measure, tables=tables, plot=plot).main()
