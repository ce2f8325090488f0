"""Fake-quantized, packed and stored are one model: if these fail, what is served is not what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma_qat.checkpoint.native import load_quantized, save_model
from gemma_qat.decode import generate
from gemma_qat.models import Gemma4, float_parameters, packed_model, quantize_parameters
from gemma_qat.models.capture import captured_codes, differing
from gemma_qat.numerics import PackedArray

MORE = [
    ("tiny_e2b", "q4_0"), ("tiny_e4b", "q4_0"), ("tiny_12b", "q4_0"), ("tiny_31b", "q4_0"), ("tiny_e4b", "mobile"),
]  # fmt: skip
"""Beside one of each family and kind of grid."""


@pytest.mark.parametrize(
    "fitted_twin",
    [
        ("tiny_e2b", "mobile"), ("tiny_26b_a4b", "q4_0"),
        *(pytest.param(row, marks=pytest.mark.slow) for row in MORE),
    ],
    indirect=True, ids="-".join,
)  # fmt: skip
def test_packed_equals_fake_quantized(fitted_twin: Any) -> None:
    """Logits bit for bit, and greedy tokens through a cache that wraps around (window 5)."""
    case, fitted = fitted_twin, fitted_twin.fitted
    fake = Gemma4.from_parameters(fitted.config, case.parameters, fitted.plans)
    floats = float_parameters(case.parameters, fitted)
    packed = packed_model(quantize_parameters(case.parameters, fitted), floats, fitted)
    holders = {path for path, leaf in packed.parameters().items() if isinstance(leaf, PackedArray)}
    assert holders == set(fitted.plans)
    np.testing.assert_array_equal(packed(case.tokens), fake(case.tokens))
    prompts = [case.tokens[0, :7].tolist(), case.tokens[1, :3].tolist()]
    tokens = [generate(model, prompts, max_new_tokens=9) for model in (fake, packed)]
    np.testing.assert_array_equal(*tokens)


def test_captured_recomputed_and_stored_codes_agree(fitted_twin: Any, tmp_path: Path) -> None:
    """What the jitted forward used, what the quantizer gives, and what a checkpoint holds: no code differs."""
    case, fitted = fitted_twin, fitted_twin.fitted
    captured = captured_codes(case.parameters, fitted, row_length=48)
    given = quantize_parameters(case.parameters, fitted)
    save_model(tmp_path / "saved", case.parameters, fitted)
    manifest, stored = load_quantized(tmp_path / "saved")
    assert manifest.fitted == fitted
    assert captured.keys() == given.keys() == stored.keys() == fitted.plans.keys()
    for path in given:
        assert captured[path].codes.shape == given[path].codes.shape, path
    assert differing(captured, given) == {"codes": 0, "scales": 0}
    assert differing(stored, given) == {"codes": 0, "scales": 0}


def test_one_moved_master_is_noticed(fitted_twin: Any) -> None:
    """The comparison above can fail: one master moved by two steps is one code."""
    fitted, parameters = fitted_twin.fitted, fitted_twin.parameters
    path = "layers/0/attn/q/kernel"
    given = quantize_parameters(parameters, fitted)
    moved = parameters | {path: parameters[path].copy()}
    moved[path][np.unravel_index(abs(parameters[path]).argmax(), parameters[path].shape)] *= -1
    assert differing(quantize_parameters(moved, fitted), given)["codes"] == 1
