"""Artifacts for the export tests, and our layouts turned into [out, in] a second time, by hand."""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from gemma_qat.export import Artifact, Vocabulary
from gemma_qat.models import (
    Gemma4,
    declare,
    fit,
    float_parameters,
    initialize,
    packed_model,
    quantize_parameters,
    size_named,
    static_scale_paths,
)
from gemma_qat.models.config import ModelConfig
from gemma_qat.numerics import Grid, QArray, scale_shape
from gemma_qat.ptq import calibrate
from gemma_qat.quant import Plan

_HALVES = (np.float16(6e-8), np.float16(-0.0), np.float16(65504), np.float16(-1.5))


@pytest.fixture(scope="session")
def case() -> ModuleType:
    """Returns this file: test modules cannot import one another."""
    return sys.modules[__name__]


def qarray(codes: Any, scale: Any, grid: Grid, reduced: tuple[int, ...]) -> QArray:
    """Returns a `QArray` of numpy arrays."""
    return QArray(jnp.asarray(codes), jnp.asarray(scale), grid, reduced)


def artifact(
    config: ModelConfig, recipe: str = "q4_0", tokenizer: Vocabulary | None = None, seed: int = 0
) -> Artifact:
    """Returns random codes and scales (every code, both signs, the ends of float16) on a recipe's plans."""
    rng = np.random.default_rng(seed)
    fitted = fit(config, recipe)
    quantized, floats = {}, {}
    for path, parameter in declare(fitted.config).items():
        plan = fitted.plans.get(path)
        if plan is None:
            floats[path] = rng.standard_normal(parameter.shape).astype(np.float32)
            continue
        fmt = plan.weight.number
        shape = scale_shape(parameter.shape, parameter.reduced, plan.weight)
        scale = rng.standard_normal(shape).astype(plan.weight.scale_dtype)
        scale.flat[: len(_HALVES)] = _HALVES
        codes = rng.integers(fmt.code_min, fmt.code_max + 1, parameter.shape, np.int8)
        quantized[path] = qarray(codes, scale, plan.weight, parameter.reduced)
    floats |= {path: np.full(1, 0.5, np.float32) for path in static_scale_paths(fitted.plans)}
    return Artifact(
        config=fitted.config, recipe=recipe, plans=fitted.plans, quantized=quantized,
        floats=floats, tokenizer=tokenizer,
    )  # fmt: skip


@functools.cache
def twin(name: str) -> Artifact:
    """Returns the artifact of a tiny twin; shared between tests, which only read it."""
    return artifact(size_named(name))


def smallest(**changes: object) -> ModelConfig:
    """Returns an E2B-like config of four layers that is quick to write."""
    base = size_named("tiny_e2b")
    small = dataclasses.replace(
        base, name="small", layer_kinds=("sliding", "full", "sliding", "full"), vocab_size=64,
        per_layer_vocab=64, width=64, head_width=32, global_head_width=64, ffn_width=32,
        shared_ffn_width=64, shared_kv_layers=2,
    )  # fmt: skip
    return dataclasses.replace(small, **changes)  # pyright: ignore


def float_artifact(config: ModelConfig) -> Artifact:
    """Returns an artifact without any plan: random float parameters."""
    rng = np.random.default_rng(0)
    floats = {
        path: rng.standard_normal(p.shape).astype(np.float32) for path, p in declare(config).items()
    }
    return Artifact(config=config, recipe="float", plans={}, quantized={}, floats=floats)


def halved(q: QArray) -> QArray:
    """Returns codes with their scales rounded to float16, zeros included."""
    half = np.asarray(q.scale).astype(np.float16).astype(q.scale.dtype)
    return dataclasses.replace(q, scale=jnp.asarray(half))


def constant(q: QArray, scale: float) -> QArray:
    """Returns codes with one scale everywhere."""
    return dataclasses.replace(q, scale=jnp.full_like(q.scale, scale))


def half_planned(config: ModelConfig, left_out: str) -> Artifact:
    """Returns an artifact on the q4_0 recipe in which one site stays in float."""
    full = artifact(config)
    plans = {path: plan for path, plan in full.plans.items() if path != left_out}
    quantized = {path: q for path, q in full.quantized.items() if path != left_out}
    kept = np.asarray(full.quantized[left_out].codes, np.float32)
    return dataclasses.replace(
        full, plans=plans, quantized=quantized, floats={**full.floats, left_out: kept}
    )


def coarse(config: ModelConfig) -> Artifact:
    """Returns an artifact whose embedding is int8 per row."""
    full = artifact(config)
    grid = Grid(format="int8")
    table = qarray(
        np.zeros((config.vocab_size, config.width), np.int8),
        np.ones((config.vocab_size, 1), np.float32),
        grid,
        (1,),
    )
    return dataclasses.replace(
        full,
        recipe="coarse",
        plans={**full.plans, "embed/table": Plan(weight=grid)},
        quantized={**full.quantized, "embed/table": table},
    )


def by_hand(path: str, x: np.ndarray) -> np.ndarray:
    """Returns an array of ours in torch's order, written out per layout."""
    name = re.sub(r"layers/\d+/", "layer:", path)
    if re.search(r"attn/[qkv]/kernel", name):  # D heads H
        d, heads, h = x.shape
        return x.transpose(1, 2, 0).reshape(heads * h, d)
    if name == "layer:attn/o/kernel":  # N H D
        n, h, d = x.shape
        return x.transpose(2, 0, 1).reshape(d, n * h)
    if name.startswith("layer:experts/"):  # E in out
        return x.transpose(0, 2, 1)
    if name == "per_layer/embed/table":  # V L P
        v, layers, p = x.shape
        return x.reshape(v, layers * p)
    if name == "per_layer/projection/kernel":  # D L P
        d, layers, p = x.shape
        return x.transpose(1, 2, 0).reshape(layers * p, d)
    if name.endswith("/kernel"):  # in out
        return x.transpose(1, 0)
    return x


@functools.cache
def _phone(design: str, vocab: int) -> tuple[Any, dict[str, Any]]:
    """What `phone` is fitted to, and its float parameters."""
    config = smallest(
        shared_ffn_width=64 if design == "e2b" else 0, vocab_size=vocab, per_layer_vocab=vocab
    )
    if design == "12b":
        config = dataclasses.replace(size_named("tiny_12b"), name="small", layer_kinds=("sliding", "sliding", "full"), vocab_size=vocab, width=64, head_width=32, global_head_width=64, ffn_width=64)  # fmt: skip
    fitted = fit(config, "mobile_like" if design == "12b" else "mobile")
    rng = np.random.default_rng(1)
    spread = {path: rng.uniform(0.8, 1.25, p.shape).astype(np.float32) for path, p in declare(config).items() if p.init == "constant"}  # fmt: skip
    parameters = initialize(
        fitted.config, 1
    )  # with a head of its own: a tied one says its token again
    parameters |= {path: parameters[path] * factor for path, factor in spread.items()}
    return fitted, fitted.adopt(parameters)


@functools.cache
def phone_codes(design: str = "e2b", vocab: int = 64) -> Artifact:
    """Returns an artifact of the mobile schema, of a small e2b, e4b or 12b; its static scales are all the same.

    Rows of few levels are among its codes: all 0, one level, and two levels that are not neighbours.
    """
    fitted, parameters = _phone(design, vocab)
    floats = float_parameters(parameters, fitted)
    floats |= {path: np.full(1, 0.04, np.float32) for path in static_scale_paths(fitted.plans)}
    quantized = quantize_parameters(parameters, fitted)
    for path in ("embed/table", "layers/0/ffn/gate/kernel", "layers/1/ffn/up/kernel"):
        q = quantized[path]
        codes = np.moveaxis(np.array(q.codes), q.reduced[0], -1)  # rows
        codes[0], codes[1], codes[2, ::2], codes[2, 1::2] = 0, -2, 1, -1
        codes = jnp.asarray(np.moveaxis(codes, -1, q.reduced[0]))
        quantized[path] = dataclasses.replace(q, codes=codes)
    return Artifact(
        config=fitted.config, recipe=fitted.recipe, plans=fitted.plans, quantized=quantized,
        floats={path: np.asarray(x) for path, x in floats.items()},
    )  # fmt: skip


@functools.cache
def phone(design: str = "e2b") -> tuple[Artifact, Gemma4]:
    """Returns what `phone_codes` does, calibrated, and its packed model."""
    fitted, parameters = _phone(design, 64)
    tokens = np.random.default_rng(1).integers(0, 64, (4, 48)).astype(np.int32)
    positions = np.broadcast_to(np.arange(48, dtype=np.int32), tokens.shape)
    batch = {"tokens": tokens, "segments": np.ones_like(tokens), "positions": positions}
    model = Gemma4.from_parameters(fitted.config, parameters, fitted.plans)
    floats = float_parameters(parameters | calibrate(model, [batch]).scales, fitted)
    floats["layers/0/attn/k/kernel_input_scale"] *= 1.25  # q, k and v read the same numbers
    found = phone_codes(design)
    found = dataclasses.replace(found, floats={path: np.asarray(x) for path, x in floats.items()})
    return found, packed_model(found.quantized, found.floats, fitted)
