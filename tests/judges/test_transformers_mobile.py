"""The mobile layers of huggingface/transformers (`integrations/gemma_quant.py`) on our own packed words.

Run with torch and transformers (5.11 or later) installed:  bash launch/test.sh -m judges tests/judges
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_qat.nn.contract import Weight, contract
from gemma_qat.numerics import Grid, PackedArray, pack, quantize
from gemma_qat.quant import Activation, Plan

pytestmark = pytest.mark.judges
R, OUT = 192, 320
STEP_IN, STEP_OUT = 0.0213, 0.171


def _gemma_quant() -> Any:
    reason = "needs torch and transformers with the Gemma mobile layers"
    pytest.importorskip("torch", reason=reason)
    return pytest.importorskip("transformers.integrations.gemma_quant", reason=reason)


def _packed(bits: int, shape: tuple[int, int], reduced: tuple[int, ...]) -> PackedArray:
    rng = np.random.default_rng(bits)
    w = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    grid = Grid(format=f"int{bits}", divisor=2.0 ** (bits - 1))
    return jax.jit(lambda w: pack(quantize(w, grid, reduced)))(w)


def _theirs(words: jax.Array, bits: int) -> Any:
    """Our bytes as their storage: offset binary, but two's complement at 8 bits."""
    import torch

    host = np.asarray(words)
    return torch.from_numpy((host ^ 128).view(np.int8) if bits == 8 else host.copy())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("steps", [(STEP_IN, STEP_OUT), (0.0, 0.0)], ids=["rounded", "identity"])
def test_linear(bits: int, steps: tuple[float, float]) -> None:
    """If it fails, the released layer does something else with our codes and scales than we train."""
    import torch

    layer = _gemma_quant().QuantizedLinear(R, OUT, num_bits=bits)
    packed = _packed(bits, (R, OUT), (0,))
    layer.weight.data = _theirs(packed.words, bits)
    layer.weight_scale.data = torch.from_numpy(np.array(packed.scale))
    layer.input_activation_scale.data = torch.tensor(steps[0])
    layer.output_activation_scale.data = torch.tensor(steps[1])
    x = np.random.default_rng(3).standard_normal((1, 512, R)).astype(np.float32)
    with torch.no_grad():
        expected = layer(torch.from_numpy(x)).numpy()
    plan = Plan(weight=packed.grid, input=Activation(), output=Activation())
    leaves = {"kernel": packed, "kernel_input_scale": jnp.asarray(steps[:1], jnp.float32)}
    leaves["kernel_output_scale"] = jnp.asarray(steps[1:], jnp.float32)
    weight = Weight("kernel", leaves, (0,), plan)
    ours = np.asarray(jax.jit(lambda x: contract("BTD,DF->BTF", x, weight))(x))
    if not steps[1]:
        np.testing.assert_allclose(ours, expected, atol=1e-4)  # 192 products, another order of sums
        return
    codes, theirs = (np.round(y / steps[1]) for y in (ours, expected))
    differing = int((codes != theirs).sum())
    print(f"{bits} bits: {differing} of {codes.size} output codes differ")
    # Float sums in another order differ by some 1e-6 of a step of 0.171: codes differ where a sum lies that near a
    # boundary, and an input code where x / s and x * (1 / s) round apart: about one in 1e6 each.
    assert differing <= 8 and np.abs(codes - theirs).max() <= 1
    np.testing.assert_allclose(ours[codes == theirs], expected[codes == theirs], rtol=2e-7)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_embedding(bits: int) -> None:
    """Rows of a table: codes times the row's scale, no sum, so equal bit for bit."""
    import torch

    table = _packed(bits, (OUT, R), (1,))
    layer = _gemma_quant().QuantizedEmbedding(OUT, R, torch.float32, num_bits=bits)
    layer.embedding_quantized.data = _theirs(table.words, bits)
    layer.embedding_scale.data = torch.from_numpy(np.array(table.scale))
    ids = np.random.default_rng(5).integers(0, OUT, (3, 7))
    with torch.no_grad():
        expected = layer(torch.from_numpy(ids)).numpy()
    weight = Weight("table", {"table": table}, (1,), Plan(weight=table.grid))
    np.testing.assert_array_equal(weight.rows(jnp.asarray(ids)), expected)
