"""What LiteRT computes beside what was trained, product by product, block by block and as a whole: see README.md."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.litert.blocks import Blocks, Codes, Ours, exact_products, theirs
from experiments.study import (  # fmt: skip
    RUNS,
    Result,
    Scale,
    Study,
    bars,
    estimates,
    from_twin,
    said,
    table,
    trained,
    twins,
)
from gemma_qat.data.held_out import first_rows
from gemma_qat.data.packing import Rows
from gemma_qat.decode import generate
from gemma_qat.evals import TokenRecords
from gemma_qat.export import Artifact, artifact_of
from gemma_qat.export.litert import Lengths, LiteRTModel, as_written, export_litert, write_model
from gemma_qat.export.litert.graph import owners
from gemma_qat.export.litert.stored import stored
from gemma_qat.models import Fitted, Gemma4, packed_model
from gemma_qat.start import resolve_checkpoint

FOLDER = Path(__file__).resolve().parent
LENGTHS = Lengths(prefill=64, cache=256)
PACKAGES = ("litert-converter", "ai-edge-litert", "jax")
NEW = 64


def measure(scale: Scale) -> Result:
    """Returns what LiteRT makes of a twin that was trained on the mobile schema, beside the packed model it is."""
    twin = next(iter(twins("tiny_e2b", scale)))
    config = from_twin(twin, "mobile", scale.steps(400))
    trained(config)
    artifact = as_written(artifact_of(resolve_checkpoint(config.folder)))
    fitted = Fitted(config=artifact.config, recipe=artifact.recipe, plans=artifact.plans)
    model = packed_model(artifact.quantized, artifact.floats, fitted)
    folder = RUNS / "litert"
    folder.mkdir(parents=True, exist_ok=True)
    size = export_litert(artifact, folder / "twin.tflite", LENGTHS)
    write_model(
        folder / "taps.tflite", artifact.config, artifact.plans, artifact.quantized, artifact.floats,
        recipe=artifact.recipe, lengths=LENGTHS, taps=True,
    )  # fmt: skip
    rows = first_rows(twin.rows, 1 if scale.tiny else 4)
    full = rows[(rows.segments == 1).all(axis=1)]
    litert = LiteRTModel(folder / "twin.tflite", threads=2)
    other = _an_ulp_apart(artifact, fitted)
    listened, moved = Ours(model, artifact.floats), Ours(other, artifact.floats)
    mine = [listened(tokens)[1] for tokens in full.tokens[:8]]
    phone = [
        theirs(folder / "taps.tflite", LENGTHS, artifact.config, tokens)
        for tokens in full.tokens[:8]
    ]
    return {
        "versions": {name: version(name) for name in PACKAGES},
        "bytes": size["bytes"], "tensors": size["tensors"],
        "products": _products(phone, artifact),
        "layers": _drift(mine, phone),
        "divergence": _divergence(model, litert.logits, full, twin.token_bytes, scale),
        "ulp": {
            "layers": _drift(mine, [moved(tokens)[1] for tokens in full.tokens[:8]]),
            "divergence": _divergence(
                model, lambda tokens: np.asarray(other(tokens[None])[0]), full, twin.token_bytes, scale
            ),
        },
        "blocks": _blocks(artifact, listened, folder, full),
        "generated": _generated(model, litert, full),
        "speed": _speed(model, folder, full, 2 if scale.tiny else 9),
    }  # fmt: skip


def _products(rows: Sequence[Codes], artifact: Artifact) -> dict[str, list[int]]:
    """Every product of LiteRT's beside the fake-quantized one of its own inputs, by bits."""
    sites = stored(artifact.config, artifact.plans, artifact.quantized, artifact.floats)
    found: dict[str, list[int]] = {}
    for codes in rows:
        for path, steps in exact_products(codes, sites, artifact).items():
            _add(found, f"{artifact.plans[path].weight.number.bits} bits", steps)
    return found


def _drift(rows: Sequence[Codes], others: Sequence[Codes]) -> dict[str, list[int]]:
    """How other codes drift from ours, from layer to layer."""
    layers: dict[str, list[int]] = {}
    for mine, other in zip(rows, others, strict=True):
        for name, codes in other.items():
            parts = name.split("/")
            layer = parts[1] if parts[0] == "layers" else parts[0]
            _add(layers, layer, codes.astype(int) - mine[name])
    return layers


def _add(counts: dict[str, list[int]], name: str, steps: np.ndarray) -> None:
    """Adds up (numbers, how many differ, the most steps) under a name."""
    before = counts.get(name, [0, 0, 0])
    most = int(np.abs(steps).max())
    counts[name] = [
        before[0] + steps.size,
        before[1] + int((steps != 0).sum()),
        max(before[2], most),
    ]


def _blocks(artifact: Artifact, listened: Ours, folder: Path, rows: Rows) -> Result:
    """Feed-forwards and attentions alone, of the very inputs that ours have."""
    alone, found = Blocks(artifact, folder), {}
    values, mine = listened(rows.tokens[0])
    for layer in range(artifact.config.layers):
        for part, site in (("ffn", "gate"), ("attn", "q")):
            if part == "attn" and layer not in owners(artifact.config):
                continue
            given = values[f"layers/{layer}/{part}/{site}/kernel_input_scale"]
            run = alone.feed_forward if part == "ffn" else alone.attention
            for name, codes in run(layer, given).items():
                label = "feed-forward" if part == "ffn" else "attention"
                _add(found, label, codes.astype(int) - mine[name])
    return found


def _an_ulp_apart(artifact: Artifact, fitted: Fitted) -> Gemma4:
    """The packed model with every scale of its embedding one float32 larger: the least that can differ."""
    q = artifact.quantized["embed/table"]
    scale = np.nextafter(np.asarray(q.scale), np.float32(np.inf))
    moved = dataclasses.replace(q, scale=jnp.asarray(scale))
    return packed_model(artifact.quantized | {"embed/table": moved}, artifact.floats, fitted)


def _divergence(
    model: Gemma4,
    logits: Callable[[np.ndarray], np.ndarray],
    rows: Rows,
    token_bytes: np.ndarray,
    scale: Scale,
) -> Result:
    """Other distributions beside the packed model's, token by token."""
    log_p, log_q = [], []
    for tokens in rows.tokens:
        log_p.append(np.asarray(jax.nn.log_softmax(model(tokens[None])[0]), np.float64))
        log_q.append(np.asarray(jax.nn.log_softmax(logits(tokens)), np.float64))
    p, q = (np.stack(x)[:, :-1].reshape(-1, x[0].shape[-1]) for x in (log_p, log_q))
    wanted, at = rows.tokens[:, 1:].reshape(-1), np.arange(rows.tokens[:, 1:].size)
    _, document = np.unique(rows.documents[:, 1:].reshape(-1), return_inverse=True)
    records = TokenRecords(
        document=document, position=rows.positions[:, 1:].reshape(-1),
        nll=-q[at, wanted], reference_nll=-p[at, wanted],
        kl=np.maximum((np.exp(p) * (p - q)).sum(-1), 0.0), agree=p.argmax(-1) == q.argmax(-1),
        document_bytes=np.bincount(document, token_bytes[wanted]).astype(np.int64),
    )  # fmt: skip
    return estimates([records], scale) | {"tokens": len(at), "median": float(np.median(records.kl))}


def _generated(model: Gemma4, litert: LiteRTModel, rows: Rows) -> Result:
    """Greedy tokens after prompts of half a row, by the runtime's two signatures and by ours."""
    equal, first = 0, []
    prompts = rows.tokens[:8, :60]
    mine = generate(model, prompts, max_new_tokens=NEW)
    for prompt, expected in zip(prompts, mine, strict=True):
        same = litert.generate(prompt, NEW) == expected
        equal += int(same.sum())
        first.append(int(np.argmin(same)) if not same.all() else NEW)
    return {"prompts": len(prompts), "tokens": NEW, "equal": equal, "until_the_first_other": first}


def _speed(model: Gemma4, folder: Path, rows: Rows, rounds: int) -> Result:
    """Tokens a second of one row of NEW greedy tokens, prompt included, in turn; medians, least, most."""
    prompt = rows.tokens[0, :60]
    runs: dict[str, Callable[[], Any]] = {}
    for threads in (1, 2):
        litert = LiteRTModel(folder / "twin.tflite", threads=threads)
        runs[f"LiteRT, {threads} threads"] = lambda litert=litert: litert.generate(prompt, NEW)
    for cache in ("float", "int8"):
        runs[f"ours, {cache} cache"] = lambda cache=cache: generate(
            model, prompt[None], max_new_tokens=NEW, cache=cache
        )
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            before = time.perf_counter()
            run()
            if number:  # the first compiles
                seconds[name].append(time.perf_counter() - before)
    return {
        name: {"median": NEW / np.median(x), "least": NEW / max(x), "most": NEW / min(x)}
        for name, x in seconds.items()
    }


def tables(result: Result) -> str:
    """Returns the tables of the README."""
    made, control = result["generated"], result["ulp"]
    beside = (result["divergence"], result["ulp"]["divergence"])
    parts = [
        table(("part", "numbers", "differ", "share", "most steps"), [
            *(_row(f"products of {name}, of LiteRT's own inputs", x) for name, x in result["products"].items()),
            *(_row(f"{name} alone", x) for name, x in result["blocks"].items()),
            *(_row(f"whole decoder: {_place(name)}", x) for name, x in result["layers"].items()),
        ]),
        table(("beside our model", "LiteRT", "our own, embedding scales an ulp larger"), [
            (f"codes that differ, {_place(name)}", _share(result["layers"][name]), _share(x))
            for name, x in control["layers"].items() if name in result["layers"]
        ] + [
            ("KL, mean, nats", *(said(x["kl_mean"], "{:.2e}") for x in beside)),
            ("KL, median", *(f"{x['median']:.1e}" for x in beside)),
            ("loss, difference", *(said(x["loss_gap"], "{:.1e}") for x in beside)),
            ("same token on top", *(said(x["top1_agreement"], "{:.4f}") for x in beside)),
        ]),
        f"{beside[0]['tokens']:,} tokens of held-out files. Greedy tokens of LiteRT's two signatures that are ours: "
        f"{made['equal']} of {made['prompts'] * NEW} after {made['prompts']} prompts; equal until token "
        f"{', '.join(map(str, made['until_the_first_other']))}.",
        table(("decoding one row", "tokens/s, median", "least to most"), [
            (name, f"{x['median']:.0f}", f"{x['least']:.0f} to {x['most']:.0f}") for name, x in result["speed"].items()
        ]),
    ]  # fmt: skip
    return "\n\n".join(parts)


def _place(name: str) -> str:
    return f"layer {name}" if name.isdigit() else name


def _row(name: str, counts: list[int]) -> tuple[str, ...]:
    total, differ, most = counts
    return name, f"{total:,}", f"{differ:,}", _share(counts), f"{most}"


def _share(counts: list[int]) -> str:
    return f"{100 * counts[1] / counts[0]:.2g} %" if counts[1] else "0"


def plot(result: Result) -> bytes:
    """Returns bars of the share of codes that differ, part by part."""
    control = result["ulp"]["layers"]
    rows: list[Any] = [
        (
            _place(name),
            {
                "LiteRT": 100 * x[1] / x[0],
                "ours, an ulp apart": 100 * control[name][1] / control[name][0],
            },
        )
        for name, x in result["layers"].items()
    ]
    return bars(rows, "codes that differ from the fake-quantized model's, %")


if __name__ == "__main__":
    Study(folder=FOLDER, measure=measure, tables=tables, plot=plot).main()
