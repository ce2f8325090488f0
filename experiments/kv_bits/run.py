"""How many bits keys and values need, where layers share them and where they do not: see README.md."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments.study import Result, Scale, Study, Twin, bars, each, estimates, said, table, twins
from gemma_qat.evals import TokenRecords
from gemma_qat.evals.variants import Variants
from gemma_qat.models import Gemma4, ModelConfig, fit, size_named, static_scale_paths
from gemma_qat.nn.stack import kv_sources
from gemma_qat.numerics import Grid
from gemma_qat.ptq import CalibrationConfig, calibrate
from gemma_qat.quant import Activation, Plan, Plans
from gemma_qat.quant.rounded import Rounded

FOLDER = Path(__file__).resolve().parent
SHARED = dataclasses.replace(size_named("tiny_e2b"), name="tiny_e2b_narrow", shared_ffn_width=0)
"""`tiny_e2b` with feed-forwards that are all as wide, so that the other differs in one thing."""
OWN = dataclasses.replace(SHARED, name="tiny_e2b_own_kv", shared_kv_layers=0)
"""The same without sharing: every layer has keys and values of its own."""
WEIGHTS = "q4_0 weights, for comparison"

BOTH = ("key_cache_scale", "value_cache_scale")
KEYS, VALUES = BOTH[:1], BOTH[1:]
TOKEN, STATIC = "token", "tensor"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CachePlan(Plan):
    """A plan that rounds keys, values or both, and whose weight stays as it is: its leaf is `Rounded` already."""

    only: tuple[str, ...] = BOTH

    @property
    def activations(self) -> dict[str, Activation]:
        """What is rounded, by the suffix of its scale."""
        return {name: how for name, how in super().activations.items() if name in self.only}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Caches:
    """Which caches are rounded, and how."""

    bits: int = 4
    per: str = TOKEN
    only: tuple[str, ...] = BOTH
    layers: tuple[int, ...]

    def plans(self) -> Plans:
        """Returns the plans of the key projections, which carry the rounding of both."""
        how = Activation(bits=self.bits, per=self.per)  # type: ignore[arg-type]
        plan = CachePlan(weight=Grid(format="int8"), cache=how, only=self.only)
        return {_key(layer): plan for layer in self.layers}


def measure(scale: Scale) -> Result:
    """Returns the divergence by which caches are rounded, of the twin that shares and of the one that does not."""
    return {size.name: _of(size, scale) for size in (SHARED, OWN)}


def _of(size: ModelConfig, scale: Scale) -> Result:
    kept: dict[str, list[TokenRecords]] = {}
    variants = _variants(size, scale)
    for twin in twins(size, scale):
        for name, caches in variants.items():
            kept.setdefault(name, []).append(twin.records(_model(twin, caches)))
        kept.setdefault(WEIGHTS, []).append(twin.records(_on_q4_0(twin)))
    return {
        "owners": list(_owners(size)), "sources": sorted(kv_sources(size.layer_shapes()).values()),
        "kinds": list(size.layer_kinds),
        "kl": {name: estimates(records, scale) for name, records in kept.items()},
    }  # fmt: skip


def _on_q4_0(twin: Twin) -> Gemma4:
    plans = fit(twin.model.config, "q4_0").plans
    grids = {path: plan.weight for path, plan in plans.items()}
    return Variants.of(twin.model, twin.model.config, "mse").on(grids)


def _variants(size: ModelConfig, scale: Scale) -> dict[str, Caches]:
    every = _owners(size)
    found = {
        "int4 keys": Caches(only=KEYS, layers=every),
        "int4 values": Caches(only=VALUES, layers=every),
        "int4 static keys": Caches(only=KEYS, per=STATIC, layers=every),
        "int4 static values": Caches(only=VALUES, per=STATIC, layers=every),
    }
    for bits in (8, 4):
        for per, title in ((TOKEN, "per token"), (STATIC, "static")):
            found[f"int{bits} {title}"] = Caches(bits=bits, per=per, layers=every)
    for layer in every[:1] if scale.tiny else every:
        found[f"layer {layer} keys"] = Caches(only=KEYS, layers=(layer,))
        found[f"layer {layer} values"] = Caches(only=VALUES, layers=(layer,))
    for title, layers in _sets(size).items():
        found[title] = Caches(layers=layers)
    return found


def _sets(size: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the layers that others read in the twin that shares, those before, and those that share there."""
    sources = kv_sources(SHARED.layer_shapes()).values()
    first = min(sources)
    sets = {"layers before": range(first), "layers that are shared": sources}
    found = {title: tuple(sorted(layers)) for title, layers in sets.items()}
    after = tuple(i for i in _owners(size) if i > max(sources))
    return found | ({"layers after": after} if after else {})


def _owners(size: ModelConfig) -> tuple[int, ...]:
    return tuple(i for i, shape in enumerate(size.layer_shapes()) if not shape.shares_kv)


def _key(layer: int) -> str:
    return f"layers/{layer}/attn/k/kernel"


def _model(twin: Twin, caches: Caches) -> Gemma4:
    """Returns the float model with those caches rounded; static scales are calibrated on training rows."""
    parameters, plans = dict(twin.model.parameters()), caches.plans()
    scales: dict[str, Any] = {path: jnp.zeros(1, jnp.float32) for path in static_scale_paths(plans)}
    parameters |= {path: Rounded(parameters[path]) for path in plans}

    def built() -> Gemma4:
        return Gemma4.from_parameters(twin.model.config, parameters | scales, plans)

    if scales:
        scales |= calibrate(built(), twin.batches(8), CalibrationConfig(method="mse")).scales
    return built()


def tables(result: Result) -> str:
    """Returns the tables of the README."""
    return "\n\n".join((_whole(result), _by_layer(result)))


def _whole(result: Result) -> str:
    rows = []
    names = dict.fromkeys(name for found in result.values() for name in found["kl"])
    for name in names:
        if not name.startswith("layer "):
            cells = [found["kl"].get(name) for found in result.values()]
            texts = [_figure(one) for one in cells]
            is_whole = name == WEIGHTS or "int" in name
            rows.append([name if is_whole else f"int4 of {name}", *texts])
    return table(("rounded", *(f"KL, {name} (each twin)" for name in result)), rows)


def _figure(one: Result | None) -> str:
    return "–" if one is None else f"{said(one['kl_mean'], '{:.3g}')} ({each(one)})"


def _by_layer(result: Result) -> str:
    rows = []
    for layer in range(max(max(found["owners"]) for found in result.values()) + 1):
        cells = []
        for found in result.values():
            for part in ("keys", "values"):
                one = found["kl"].get(f"layer {layer} {part}")
                cells.append("–" if one is None else f"{one['kl_mean']['value']:.5f}")
        kind = next(iter(result.values()))["kinds"][layer]
        rows.append([f"{layer} ({'global' if kind == 'full' else 'sliding'})", *cells])
    headings = [f"{name}: {part}" for name in result for part in ("keys", "values")]
    return table(("int4 of one layer alone", *headings), rows)


def plot(result: Result) -> bytes:
    """Returns bars of KL by layer, keys and values of both twins."""
    rows: list[Any] = []
    for layer in _layers(result):
        values = {}
        for name, found in result.items():
            for part in ("keys", "values"):
                if (one := found["kl"].get(f"layer {layer} {part}")) is not None:
                    values[f"{name}: {part}"] = one["kl_mean"]
        shared = layer in next(iter(result.values()))["sources"]
        rows.append((f"layer {layer}{', shared' if shared else ''}", values))
    return bars(rows, "KL of int4 in one layer's cache (nats per token)")


def _layers(result: Result) -> Iterable[int]:
    return np.unique(np.concatenate([found["owners"] for found in result.values()])).tolist()


if __name__ == "__main__":
    Study(folder=FOLDER, measure=measure, tables=tables, plot=plot).main()
