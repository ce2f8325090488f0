"""How fast whole models decode from random weights: tokens a second, and the share of what their bytes allow.

Weights are made on the device, each leaf as the model holds it: random words, one constant for scales, static scales of
activations 0.1, floats as they start training. Speed does not depend on them; which experts are chosen does, and what a
step reads is counted as if a batch chose as many as it can.

`stream` decodes greedily after a prompt; a step's time is the median between tokens, the first of which, with
what compiles, is left out. Models take turns in memory, so packed ones are measured after floats and not in turn.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_qat.decode import Sampling, stream
from gemma_qat.decode.roofline import figures
from gemma_qat.evals import bench_device
from gemma_qat.models import (
    Gemma4,
    ModelConfig,
    RunOptions,
    abstract_parameters,
    declare,
    fit,
    laid_for_kernels,
    stack_layers,
)
from gemma_qat.numerics import Grid, PackedArray, QArray, pack, scale_shape
from gemma_qat.quant import Plans

STATIC_SCALE = 0.1
PROMPT = 16
"""Tokens before the first that is timed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What is run. `steps` are timed tokens; `bandwidth` the copy's bytes a second; `memory` bytes to stay within."""

    batches: Sequence[int]
    caches: Sequence[str]
    steps: int
    options: RunOptions
    memory: int
    bandwidth: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Whole:
    """A model's decoding. Units: bytes of weights; seconds a step; None where it was not measured: `note` says why."""

    size: str
    weights: str
    """A recipe, or a float dtype."""
    cache: str
    batch: int
    weight_bytes: int
    seconds: float | None = None
    tokens_per_second: float | None = None
    bytes_per_token: float | None = None
    roofline_share: float | None = None
    """Of the tokens a second that the measured bandwidth of a copy allows."""
    speedup: float | None = None
    """Tokens a second over those from float weights."""
    note: str = ""


def bench_whole(
    config: ModelConfig,
    recipes: Sequence[str],
    setting: Setting,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Whole]:
    """Returns the figures of a model with float weights and with those of each recipe, per cache and batch."""
    say = progress or (lambda what, done, total: None)
    every = [None, *recipes]
    out: list[Whole] = []
    for number, recipe in enumerate(every):
        say(f"{config.name}: models", number, len(every))
        floats = {
            (w.cache, w.batch): w.tokens_per_second for w in out if w.weights == _dtype(setting)
        }
        for one in _model(config, recipe, setting):
            plain = floats.get((one.cache, one.batch))
            if plain and one.tokens_per_second:
                one = dataclasses.replace(one, speedup=one.tokens_per_second / plain)
            out.append(one)
        gc.collect()  # models hold cycles
        jax.clear_caches()
    say(f"{config.name}: models", len(every), len(every))
    return out


def _dtype(setting: Setting) -> str:
    return setting.options.dtype


def _model(config: ModelConfig, recipe: str | None, setting: Setting) -> Iterator[Whole]:
    fitted = None if recipe is None else fit(config, recipe)
    plans = {} if fitted is None else fitted.plans
    config = config if fitted is None else fitted.config
    shapes = abstract_leaves(config, plans, _dtype(setting))
    size = _bytes(shapes)
    model: Gemma4 | None = None
    for cache in setting.caches:
        for batch in setting.batches:
            one = Whole(
                size=config.name, weights=recipe or _dtype(setting), cache=cache, batch=batch,
                weight_bytes=size,
            )  # fmt: skip
            kept = _bytes(_caches(config, plans, shapes, setting, cache, batch))
            note = bench_device.short_of("weights and cache", size + kept, setting.memory)
            if note:
                yield dataclasses.replace(one, note=note)
                continue
            if model is None:
                leaves = random_leaves(config, plans, shapes)
                model = laid_for_kernels(Gemma4(config, leaves, plans, setting.options))
            yield dataclasses.replace(one, **_figures(model, batch, cache, setting))


def _figures(model: Gemma4, batch: int, cache: str, setting: Setting) -> dict[str, Any]:
    seconds = _seconds(model, batch, cache, setting.steps)
    length = _length(setting)
    found = figures(model, batch, length, cache, seconds, bandwidth=setting.bandwidth)
    kept = ("tokens_per_second", "bytes_per_token", "roofline_share")
    return {"seconds": seconds, **{name: found[name] for name in kept}}


def _length(setting: Setting) -> int:
    """Slots of a cache: the prompt, two tokens that are not timed, and those that are."""
    return PROMPT + setting.steps + 2


def _seconds(model: Gemma4, batch: int, cache: str, steps: int) -> float:
    rows = np.random.default_rng(0).integers(1, model.config.vocab_size, (batch, PROMPT))
    times = []
    for _ in stream(
        model, rows, max_new_tokens=steps + 2, sampling=Sampling(), cache=cache
    ):  # fmt: skip
        times.append(time.perf_counter())
    return float(np.median(np.diff(times)[1:]))  # the step is compiled before the second token


def _caches(
    config: ModelConfig, plans: Plans, shapes: Any, setting: Setting, cache: str, batch: int
) -> Any:
    def make(leaves: Any) -> Any:
        model = laid_for_kernels(Gemma4(config, leaves, plans, setting.options))
        return model.empty_caches(batch, _length(setting), None if cache == "float" else cache)

    return jax.eval_shape(make, shapes)


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def abstract_leaves(config: ModelConfig, plans: Plans, dtype: str) -> dict[str, Any]:
    """Returns the shapes of a decoding model's leaves by in-memory path: planned sites packed, the others floats.

    Matrices and tables are of `dtype`; the router, norms and scales float32.
    """
    leaves: dict[str, Any] = abstract_parameters(config, plans)
    for path, parameter in declare(config).items():
        if path in plans:
            leaves[path] = _abstract(parameter.shape, parameter.reduced, plans[path].weight)
        elif parameter.is_site and parameter.role != "router":
            leaves[path] = jax.ShapeDtypeStruct(parameter.shape, jnp.dtype(dtype))
    return stack_layers(leaves, config, plans)


@functools.cache
def _abstract(shape: tuple[int, ...], reduced: tuple[int, ...], grid: Grid) -> PackedArray:
    def make() -> PackedArray:
        scale = jnp.zeros(scale_shape(shape, reduced, grid), grid.scale_dtype)
        return pack(
            QArray(codes=jnp.zeros(shape, jnp.int8), scale=scale, grid=grid, reduced=reduced)
        )

    return jax.eval_shape(make)


def random_leaves(config: ModelConfig, plans: Plans, shapes: dict[str, Any]) -> dict[str, Any]:
    """Returns leaves of the given shapes, each made on the device as it is held."""
    declared = stack_layers(declare(config), config, plans, join=lambda parts: parts[0])
    root = jax.random.key(0, impl="rbg")
    out: dict[str, Any] = {}
    for path, shape in shapes.items():
        key = jax.random.fold_in(root, zlib.crc32(path.encode()))
        parameter = declared.get(path)
        if isinstance(shape, PackedArray):
            assert parameter is not None
            # Of about the size that a matrix starts training with.
            step = 2 * parameter.init_scale / 2**shape.grid.number.bits
            out[path] = dataclasses.replace(
                shape,
                words=_words(key, shape.words.shape),
                scale=jnp.full(shape.scale.shape, step, shape.scale.dtype),
            )
        elif parameter is None:
            out[path] = jnp.full(shape.shape, STATIC_SCALE, shape.dtype)
        elif parameter.init == "constant":
            out[path] = jnp.full(shape.shape, parameter.init_scale, shape.dtype)
        else:
            out[path] = _normal(key, shape.shape, shape.dtype, parameter.init_scale)
    return out


@functools.partial(jax.jit, static_argnums=1)
def _words(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.bits(key, shape, jnp.uint8)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _normal(key: jax.Array, shape: tuple[int, ...], dtype: Any, deviation: float) -> jax.Array:
    return (deviation * jax.random.normal(key, shape, dtype)).astype(dtype)
