"""The codes a training forward pass really used, taken from inside it.

The forward is run, jitted, on tokens that cover the vocabulary, with taps at every quantized weight. Tables
that are only looked up are quantized row by row where they are read, so their codes are put together from
the rows.

This is a witness: checkpoints store `fit.quantize_parameters`, and tests and the quickstart compare what was
exported with what is captured here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gemma_qat.models.fit import Fitted
from gemma_qat.models.gemma4 import Gemma4, RunOptions
from gemma_qat.models.leaves import stack_layers
from gemma_qat.numerics import QArray


def captured_codes(
    parameters: Mapping[str, Any],
    fitted: Fitted,
    options: RunOptions = RunOptions(),
    row_length: int = 128,
) -> dict[str, QArray]:
    """Returns codes and scales by checkpoint path as the jitted forward on these masters computed them."""
    vocab = fitted.config.vocab_size
    rows = -(-vocab // row_length)
    tokens = (jnp.arange(rows * row_length) % vocab).reshape(rows, row_length)

    @jax.jit
    def forward(leaves: dict[str, Any]) -> dict[str, Any]:
        taps: dict[str, Any] = {}
        model = Gemma4(fitted.config, leaves, fitted.plans, options)
        hidden, _ = model.hidden(tokens, taps=taps)
        model.logits(hidden, taps)
        return {name: value for name, value in taps.items() if name.endswith("/quantized")}

    leaves = stack_layers(dict(parameters), fitted.config, fitted.plans)
    seen = forward(leaves)
    return {path: _one(path, seen, vocab) for path in fitted.plans}


def _one(path: str, seen: Mapping[str, Any], vocab: int) -> QArray:
    if f"{path}/quantized" in seen:
        return seen[f"{path}/quantized"]
    q = seen[f"{path}_rows/quantized"]

    def table(x: jax.Array) -> jax.Array:
        return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])[:vocab]

    reduced = tuple(axis - 1 for axis in q.reduced)
    return QArray(codes=table(q.codes), scale=table(q.scale), grid=q.grid, reduced=reduced)


def differing(ours: Mapping[str, QArray], theirs: Mapping[str, QArray]) -> dict[str, int]:
    """Returns how many codes and how many scales differ between two sets of the same sites.

    Raises: ValueError naming a site that only one of them has.
    """
    for path in sorted(ours.keys() ^ theirs.keys()):
        raise ValueError(f"{path}: quantized in one set and not in the other")
    codes = sum(int((ours[p].codes != theirs[p].codes).sum()) for p in ours)
    scales = sum(int((ours[p].scale != theirs[p].scale).sum()) for p in ours)
    return {"codes": codes, "scales": scales}
