"""Packed models over devices: prefill and cached steps against the same model on one. Run by `eight.py`."""

from __future__ import annotations

from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from twins import MESHES, batch, model_of, parameters_of

import gemma_qat
from gemma_qat import kernels
from gemma_qat.compiled import collectives, parse
from gemma_qat.kernels import operations
from gemma_qat.models import (
    Gemma4,
    RunOptions,
    float_parameters,
    leaf_shardings,
    packed_model,
    quantize_parameters,
)
from gemma_qat.models.gemma4 import _logits
from gemma_qat.nn.module import split
from gemma_qat.nn.taps import Loads
from gemma_qat.sharding import Placement, make_mesh

CASES = [
    "moe q4_0",
    "dense q4_0",
    "dense q4_0 tpu",
    "dense q4_0 gpu",
    "e_series q4_0",
    "e_series mobile",
]


def case(name: str) -> dict[str, Any]:
    """Logits of a batch, generated tokens, bytes on one device against all bytes; backends, and dtypes that are moved."""
    jax.clear_caches()  # a program that was traced is not traced again for another backend
    family, recipe, *backend = name.split()
    fitted = model_of(family, recipe)
    masters = parameters_of(fitted.config, fitted.plans)
    whole = packed_model(
        quantize_parameters(masters, fitted), float_parameters(masters, fitted), fitted
    )
    config = MESHES["decode"]
    placement = Placement(make_mesh(config), config.preset)
    where = leaf_shardings(fitted.config, fitted.plans, placement.mesh, config.preset, packed=True)
    leaves = jax.device_put(whole.leaves(), where)
    model = Gemma4(fitted.config, leaves, fitted.plans, RunOptions(), placement)
    given = [jnp.asarray(batch()[name]) for name in ("tokens", "positions", "segments")]
    seen: set[str] = set()

    def choose(operation: str, problem: kernels.Problem, platform: str) -> kernels.Choice:
        chosen = kernels.choose(operation, problem, platform)
        if platform == "cpu":
            seen.add(f"{operation} {chosen.backend.name}")
        return chosen

    graph, state = split(model)
    forced = kernels.using(backend[0] if backend else None)
    with forced, mock.patch.object(operations, "choose", choose):
        program = _logits.lower(graph, state, *given).compile()
    moved = {
        shape.dtype
        for one in collectives(parse(program.as_text())) for shape in one.shapes
    }  # fmt: skip
    want, got = np.asarray(whole(*given)), np.asarray(program(state, *given))
    off = float(np.abs(got - want).max() / np.abs(want).max())
    if family != "moe":  # prefill and step are two more programs each
        prompts = [[3, 5, 7, 11], [2, 4], [9, 8, 1], [6]]
        for cache in ("float", "int8"):  # attention over codes is a kernel's
            how = {"max_new_tokens": 3, "cache": cache}
            want_tokens = gemma_qat.generate(whole, prompts, **how)
            with kernels.using(backend[0] if backend else None):
                np.testing.assert_array_equal(
                    want_tokens, gemma_qat.generate(model, prompts, **how)
                )
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(leaves)) / sum(
        leaf.nbytes for leaf in jax.tree.leaves(leaves)
    )
    return {"off": off, "held": held, "seen": sorted(seen), "moved": sorted(moved)} | (
        loads(model, given) if family == "moe" else {}
    )


def loads(model: Gemma4, given: list[Any]) -> dict[str, float]:
    """Metrics of expert load, counted while tokens move."""

    def run(tokens: Any, positions: Any, segments: Any) -> dict[str, Any]:
        taps = Loads()
        model.hidden(tokens, positions, segments, taps=taps)
        return taps.metrics()

    return {name: float(value) for name, value in jax.jit(run)(*given).items()}
