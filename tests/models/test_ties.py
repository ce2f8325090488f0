"""Where sums are made in another order, or as integers, tokens may differ only where logits are equal but for that."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_qat import kernels
from gemma_qat.decode import generate
from gemma_qat.models import (
    Gemma4,
    RunOptions,
    check_integer_sums,
    float_parameters,
    packed_model,
    quantize_parameters,
)

PROMPTS = [[3, 9, 1, 4, 60, 2, 33], [8, 5, 21]]
NEW = 12
"""Tokens: window 5, so that rings wrap around twice."""

CASES = [
    # (twin, recipe, sums, backend, the most that logits may be off, relative to the largest)
    ("tiny_e2b", "mobile", "integer", None, 0.05),
    ("tiny_26b_a4b", "mobile_like", "integer", None, 0.05),
    ("tiny_26b_a4b", "w8a8", "float", "blocked", 1e-5),
    ("tiny_31b", "q4_0", "float", "tpu", 1e-5),
    ("tiny_26b_a4b", "q4_0", "float", "gpu", 1e-5),
    ("tiny_e2b", "q4_0", "float", "gpu", 1e-5),
]
"""Rounded activations that fall the other way move logits by steps; without them only float32 sums differ."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("twin", "recipe", "sums", "backend", "bound"), CASES, ids=[" ".join(map(str, case[:4])) for case in CASES]
)  # fmt: skip
def test_only_ties_differ(
    calibrated_to: Any, twin: str, recipe: str, sums: Any, backend: str | None, bound: float
) -> None:
    """Greedy, from packed weights against the fake-quantized model: at the first token that differs, both are as good."""
    case = calibrated_to(twin, recipe)
    fitted, parameters = case.fitted, case.parameters
    fake = Gemma4.from_parameters(fitted.config, parameters, fitted.plans)
    floats = float_parameters(parameters, fitted)
    codes = quantize_parameters(parameters, fitted)
    packed = packed_model(codes, floats, fitted, RunOptions(sums=sums))
    if sums == "integer":
        check_integer_sums(packed, twin)
        assert any(
            plan.arithmetic == "packed"
            for plan in packed.options.active(dict(packed.plans)).values()
        )
    jax.clear_caches()  # a program that was traced is not traced again for another backend
    want = generate(fake, PROMPTS, max_new_tokens=NEW)
    with kernels.using(backend):
        got = generate(packed, PROMPTS, max_new_tokens=NEW)
        for prompt, theirs, ours in zip(PROMPTS, want, got, strict=True):
            same = int(np.argmax(theirs != ours)) if (theirs != ours).any() else NEW
            read = jnp.asarray([[*prompt, *theirs[:same]]])
            expected, found = (np.asarray(model(read))[0] for model in (fake, packed))
            off = np.abs(expected - found).max()
            assert off <= bound * np.abs(expected).max()
            if same < NEW:
                chosen = expected[-1]
                assert chosen[theirs[same]] - chosen[ours[same]] <= 2 * off
