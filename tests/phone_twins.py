"""Small models of the mobile schema, for what is written for phones."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
import numpy as np

from gemma_qat.export import Artifact
from gemma_qat.models import (
    Fitted,
    Gemma4,
    declare,
    fit,
    packed_model,
    quantize_parameters,
    size_named,
    static_scale_paths,
)


@functools.cache
def phone_codes(design: str = "e2b", vocab: int = 64) -> Artifact:
    """Returns an artifact of the mobile schema, of a small e2b, e4b or 12b.

    Rows of few levels are among its codes: all 0, one level, and two levels that are not neighbours. Static scales are
    all different; of 12b a q and k round the same numbers by the same one, as after calibration.
    """
    config = dataclasses.replace(
        size_named("tiny_e2b"), name="small", layer_kinds=("sliding", "full", "sliding", "full"), shared_kv_layers=2,
        vocab_size=vocab, per_layer_vocab=vocab, width=64, head_width=32, global_head_width=64, ffn_width=32,
        shared_ffn_width=64 if design == "e2b" else 0,
    )  # fmt: skip
    if design == "12b":
        config = dataclasses.replace(size_named("tiny_12b"), name="small", layer_kinds=("sliding", "sliding", "full"), vocab_size=64, width=64, head_width=32, global_head_width=64, ffn_width=64)  # fmt: skip
    fitted = fit(config, "mobile_like" if design == "12b" else "mobile")
    rng = np.random.default_rng(1)
    parameters: dict[str, Any] = {}
    for path, p in declare(
        fitted.config
    ).items():  # a head of its own: a tied one says its token again
        drawn = rng.standard_normal if p.init == "normal" else functools.partial(rng.uniform, 0.8, 1.25)  # fmt: skip
        parameters[path] = (p.init_scale * drawn(size=p.shape)).astype(np.float32)
    # All that is rounded is about 1 by its norm, or by the size of the weights before it.
    floats = {path: x for path, x in parameters.items() if path not in fitted.plans}
    floats |= {path: rng.uniform(0.02, 0.04, 1).astype(np.float32) for path in static_scale_paths(fitted.plans)}  # fmt: skip
    if design == "12b":
        floats["layers/1/attn/k/kernel_input_scale"] = floats["layers/1/attn/q/kernel_input_scale"]
    quantized = quantize_parameters(parameters, fitted)
    for path in ("embed/table", "layers/0/ffn/gate/kernel", "layers/1/ffn/up/kernel"):
        q = quantized[path]
        codes = np.moveaxis(np.array(q.codes), q.reduced[0], -1)  # rows
        codes[0], codes[1], codes[2, ::2], codes[2, 1::2] = 0, -2, 1, -1
        codes = jnp.asarray(np.moveaxis(codes, -1, q.reduced[0]))
        quantized[path] = dataclasses.replace(q, codes=codes)
    return Artifact(
        config=fitted.config, recipe=fitted.recipe, plans=fitted.plans, quantized=quantized, floats=floats
    )  # fmt: skip


@functools.cache
def phone(design: str = "e2b") -> tuple[Artifact, Gemma4]:
    """Returns what `phone_codes` does, and its packed model."""
    found = phone_codes(design)
    fitted = Fitted(config=found.config, recipe=found.recipe, plans=found.plans)
    return found, packed_model(found.quantized, found.floats, fitted)
