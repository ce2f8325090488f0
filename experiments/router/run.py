"""How many bits a router needs, and what tokens lose that are sent elsewhere: see README.md."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.router.forced import Mode, Routing, moved, routed
from experiments.study import (
    RUNS,
    Result,
    Scale,
    Study,
    Twin,
    bars,
    each,
    estimates,
    from_twin,
    said,
    table,
    trained,
    twins,
)
from gemma_qat.data.packing import targets
from gemma_qat.evals import TokenRecords
from gemma_qat.evals.variants import Variants
from gemma_qat.models import Gemma4, fit, packed_model
from gemma_qat.numerics import Grid, mse_search, quantize
from gemma_qat.ptq import quantize_model
from gemma_qat.train.losses import logit_scores

FOLDER = Path(__file__).resolve().parent
SIZE, STEPS = "tiny_26b_a4b", 600
RECIPES = ("w8a8", "q4_0", "w4a8", "mobile_like", "w2")
TRAINED = ("q4_0", "w2")
PRECISIONS = ("bfloat16", "int8", "int4", "int2")
MODES: tuple[Mode, ...] = ("free", "set", "whole")
ROWS = 16
QUERIES = "router float, query projections int4"


def measure(scale: Scale) -> Result:
    """Returns the divergence and the tokens sent elsewhere by precision of the router and by recipe of all else."""
    kept: dict[str, list[TokenRecords]] = {}
    went: dict[str, list[Result]] = {}
    for twin in twins(SIZE, scale, STEPS):
        for name, records, where in _measured(twin, scale):
            kept.setdefault(name, []).append(records)
            if where is not None:
                went.setdefault(name, []).append(where)
    return {
        name: estimates(records, scale) | {key: _mean(went[name], key) for key in went.get(name, [{}])[0]}
        for name, records in kept.items()
    }  # fmt: skip


def _mean(found: list[Result], key: str) -> Any:
    return np.mean([one[key] for one in found], axis=0).tolist()


def _measured(twin: Twin, scale: Scale) -> Iterator[tuple[str, TokenRecords, Result | None]]:
    """Yields (name, records, what moved) of every variant; nothing moves where routing is told."""
    batches = [_batch(twin, start) for start in range(0, len(twin.rows), ROWS)]
    own = [routed(twin.model, batch)[1] for batch in batches]
    for precision in PRECISIONS:
        model = _rounded_router(twin.model, precision)
        yield f"router {precision}", *_run(twin, model, batches, own, "free")
    queries = [path for path in twin.model.parameters() if path.endswith("attn/q/kernel")]
    variants = Variants.of(twin.model, twin.model.config, "mse")
    model = variants.on(dict.fromkeys(queries, Grid(format="int4")))
    yield QUERIES, *_run(twin, model, batches, own, "free")
    for name, model in _quantized(twin, scale):
        for mode in MODES:
            yield f"{name} {mode}", *_run(twin, model, batches, own, mode)


def _quantized(twin: Twin, scale: Scale) -> Iterator[tuple[str, Gemma4]]:
    for recipe in RECIPES[1:3] if scale.tiny else RECIPES:
        fitted = fit(twin.model.config, recipe)
        codes, floats = quantize_model(
            twin.model.parameters(), fitted, "mse", twin.batches(4) if _static(fitted) else None
        )
        yield recipe, packed_model(codes, floats, fitted)
    for recipe in TRAINED[:1] if scale.tiny else TRAINED:
        config = dataclasses.replace(
            from_twin(twin, recipe, scale.steps(200)),
            name=f"{twin.path.name}-{recipe}", directory=str(RUNS / "trained"),
        )  # fmt: skip
        yield f"{recipe}, trained", trained(config)


def _static(fitted: Any) -> bool:
    return any(plan.static_scales for plan in fitted.plans.values())


def _batch(twin: Twin, start: int) -> dict[str, np.ndarray]:
    rows = twin.rows[slice(start, start + ROWS)]
    short = ROWS - len(rows)  # Filled up with empty rows, so that shapes repeat.
    return {
        name: np.pad(getattr(rows, name), ((0, short), (0, 0)))
        for name in ("tokens", "positions", "segments")
    }


def _run(
    twin: Twin, model: Gemma4, batches: list[dict[str, np.ndarray]], own: list[Routing], mode: Mode
) -> tuple[TokenRecords, Result | None]:
    hidden, changed, lost = [], [], []
    for batch, float_routing in zip(batches, own, strict=True):
        found, went = routed(model, batch, mode, None if mode == "free" else float_routing)
        hidden.append(np.asarray(found))
        valid = batch["segments"] > 0
        pairs = [moved(_arrays(a), _arrays(b)) for a, b in zip(float_routing, went, strict=True)]
        changed.append([one[valid] for one, _ in pairs])
        lost.append([one[valid] for _, one in pairs])
    records = _records(twin, model, np.concatenate(hidden)[: len(twin.rows)])
    if mode != "free":
        return records, None
    layers = range(len(own[0]))
    return records, {
        "changed": [float(np.mean(np.concatenate([b[i] for b in changed]))) for i in layers],
        "lost": [float(np.mean(np.concatenate([b[i] for b in lost]))) for i in layers],
    }


def _arrays(routing: tuple[jax.Array, jax.Array]) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(routing[0]), np.asarray(routing[1])


def _rounded_router(model: Gemma4, precision: str) -> Gemma4:
    """Returns the float model with the weights of its routers rounded, a scale per expert."""
    parameters = dict(model.parameters())
    for path, leaf in parameters.items():
        if path.endswith("router/proj/kernel"):
            parameters[path] = _values(leaf, precision)
    return Gemma4.from_parameters(model.config, parameters, None, model.options)


def _values(leaf: jax.Array, precision: str) -> jax.Array:
    if precision == "bfloat16":
        return leaf.astype("bfloat16").astype(leaf.dtype)
    grid = Grid(format=precision)
    return quantize(leaf, grid, (0,), mse_search(leaf, grid, (0,))).dequantize().astype(leaf.dtype)


def _records(twin: Twin, model: Gemma4, hidden: np.ndarray) -> TokenRecords:
    """Returns the records of a model whose final hidden states are there."""
    wanted, weights = targets(twin.rows)
    scored = weights > 0
    parts = []
    for at in range(0, len(hidden), ROWS):
        cut = slice(at, at + ROWS)
        parts.append(_scores(model, twin, hidden[cut], twin.reference.hidden[cut], wanted[cut]))
    found = {name: np.concatenate([part[name] for part in parts])[scored] for name in parts[0]}
    present, document = np.unique(twin.rows.documents[scored], return_inverse=True)
    sizes = np.bincount(document, twin.token_bytes[wanted[scored]], minlength=len(present))
    return TokenRecords(
        document=document.astype(np.int32), position=(twin.rows.positions + 1)[scored],
        nll=found["nll"].astype(np.float64), reference_nll=found["teacher_nll"].astype(np.float64),
        kl=np.maximum(found["kl"].astype(np.float64), 0.0), agree=found["agree"] > 0.5,
        document_bytes=sizes.astype(np.int64),
    )  # fmt: skip


def _scores(model: Gemma4, twin: Twin, *arrays: np.ndarray) -> Mapping[str, np.ndarray]:
    own, guide, wanted = (jax.numpy.asarray(array) for array in arrays)
    logits = twin.reference.head.logits(twin.reference.leaves, guide)
    return {k: np.asarray(v) for k, v in logit_scores(model.logits(own), wanted, logits).items()}


def tables(result: Result) -> str:
    """Returns the tables of the README."""
    rows = [
        [name, said(one["kl_mean"], "{:.3g}"), each(one), *_moved(one)]
        for name, one in result.items()
        if name.startswith("router")
    ]
    first = table(("float but for", "KL", "each twin", *_MOVED), rows)
    rows = []
    for recipe in _recipes(result):
        free, told, whole = (result[f"{recipe} {mode}"]["kl_mean"]["value"] for mode in MODES)
        rows.append(
            [recipe, said(result[f"{recipe} free"]["kl_mean"]), *_moved(result[f"{recipe} free"]),
             f"{told:.4f}", f"{1 - told / free:.0%} ({_shares(result, recipe, MODES[1])})",
             f"{whole:.4f}", f"{1 - whole / free:.0%} ({_shares(result, recipe, MODES[2])})"]
        )  # fmt: skip
    headings = ("router float, all else", "KL", *_MOVED, "KL, the float model's experts", "of it by flips (each twin)",
                "KL, its experts and weights", "of it by routing (each twin)")  # fmt: skip
    return "\n\n".join((first, table(headings, rows)))


def _shares(result: Result, recipe: str, mode: str) -> str:
    pairs = zip(
        result[f"{recipe} {mode}"]["each_twin"], result[f"{recipe} free"]["each_twin"], strict=True
    )
    return ", ".join(f"{1 - told / free:.0%}" for told, free in pairs)


_MOVED = ("tokens with another set, by layer", "weight on experts they lost")


def _moved(one: Result) -> tuple[str, str]:
    return ", ".join(f"{share:.1%}" for share in one["changed"]), f"{np.mean(one['lost']):.2%}"


def _recipes(result: Result) -> list[str]:
    return [name.removesuffix(" free") for name in result if name.endswith(" free")]


def plot(result: Result) -> bytes:
    """Returns bars of what is left of the KL when experts are told, and when all of routing is, by recipe."""
    titles = {"set": "told the float model's experts", "whole": "and their weights"}
    rows: list[Any] = []
    for recipe in _recipes(result):
        free, *told = (result[f"{recipe} {mode}"]["kl_mean"]["value"] for mode in MODES)
        rows.append(
            (recipe, {title: one / free for title, one in zip(titles.values(), told, strict=True)})
        )
    return bars(rows, "of the KL with routing of its own")


if __name__ == "__main__":
    Study(folder=FOLDER, measure=measure, tables=tables, plot=plot).main()
