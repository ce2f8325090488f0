"""Packed models over devices: prefill and cached steps against the same model on one. Run by `eight.py`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from twins import MESHES, batch, model_of, parameters_of

import gemma_qat
from gemma_qat.models import (
    Gemma4,
    RunOptions,
    float_parameters,
    leaf_shardings,
    packed_model,
    quantize_parameters,
)
from gemma_qat.nn.taps import Loads
from gemma_qat.sharding import Placement, make_mesh

CASES = ["moe q4_0", "dense q4_0", "e_series q4_0", "e_series mobile"]


def case(name: str) -> dict[str, float]:
    """Logits of a batch, generated tokens, and bytes on one device against all bytes."""
    family, recipe = name.split()
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
    want, got = (np.asarray(m(*given)) for m in (whole, model))
    off = float(np.abs(got - want).max() / np.abs(want).max())
    if family != "moe":  # prefill and step are two more programs each
        prompts = [[3, 5, 7, 11], [2, 4], [9, 8, 1], [6]]
        both = [gemma_qat.generate(m, prompts, max_new_tokens=3) for m in (whole, model)]
        np.testing.assert_array_equal(*both)
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(leaves)) / sum(
        leaf.nbytes for leaf in jax.tree.leaves(leaves)
    )
    return {"off": off, "held": held, **loads(model, given)}


def loads(model: Gemma4, given: list[Any]) -> dict[str, float]:
    """Metrics of expert load, counted while tokens move."""

    def run(tokens: Any, positions: Any, segments: Any) -> dict[str, Any]:
        taps = Loads()
        model.hidden(tokens, positions, segments, taps=taps)
        return taps.metrics()

    return {name: float(value) for name, value in jax.jit(run)(*given).items()}
