"""Work of compiled programs: FLOPs and bytes by hand and against XLA's own count, and what a refused one asked for."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from gemma_qat.compiled import executed, parse
from gemma_qat.plan.compile import needed_bytes
from gemma_qat.plan.work import Work, work

TPU = (Path(__file__).parents[1] / "compiled" / "texts" / "tpu.txt").read_text("utf-8")


def total(text: str) -> Work:
    module = parse(text)
    found = Work()
    for name, count in executed(module).times.items():
        for one in module.computations[name].values():
            found += work(module, module.computations[name], one).times(count)
    return found


def test_work_of_a_loop() -> None:
    """If it fails, FLOPs or bytes are not those of every turn."""
    found = total(TPU)
    assert found.flops == found.passes == 5 * 2 * 8 * 128 * 128
    # Per turn: the copy writes [8, 32]; the slice of the weight is read, written, and read again by the product.
    # What a reduce-scatter keeps is written once; the messages themselves are the wires' work.
    counter = 5 * 3 * 4 + 2 * 4 + 6 * (4 + 4 + 1)  # added to, copied, compared
    assert found.bytes == 5 * (8 * 32 * 2 + 3 * 128 * 128 * 2) + 4 * 128 * 4 + counter


def test_xla_agrees_on_an_unrolled_program_and_not_on_a_loop() -> None:
    """If it fails, FLOPs are not counted as XLA counts them, or XLA has learnt to count loops."""
    x, w = jnp.zeros((8, 32)), jnp.zeros((6, 32, 32))

    def looped(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda c, one: (jnp.einsum("BD,DE->BE", c, one), None), x, w)[0]

    def unrolled(x: jax.Array, w: jax.Array) -> jax.Array:
        for i in range(6):
            x = jnp.einsum("BD,DE->BE", x, w[i])
        return x

    loop, flat = jax.jit(looped).lower(x, w).compile(), jax.jit(unrolled).lower(x, w).compile()
    product = 2 * 8 * 32 * 32
    assert flat.cost_analysis()["flops"] == 6 * product
    assert total(flat.as_text()).flops == total(loop.as_text()).flops == 6 * product
    assert product <= loop.cost_analysis()["flops"] < 2 * product  # the body once, and its counter


def test_a_batched_product_written_as_a_convolution() -> None:
    """If it fails, the padding that stands for a batch axis counts as work."""
    # BTD,DNH->BTNH with N 4 as a spatial axis, as TPU programs have it: one of 7 x 4 positions meets each of 4 x 4 pairs.
    text = TPU.replace(
        "convolution(%q2, %r2), dim_labels=bf_io->bf",
        "convolution(%q5, %r5), window={size=1x4 pad=0_0x3_3 rhs_reversal=0x1}, dim_labels=0bf1_i1o0->0b1f",
    ).replace(
        "  %ag.2",
        "  %q5 = bf16[4,256,128,1]{3,2,1,0} parameter(2)\n  %r5 = bf16[128,4,32,1]{3,2,1,0} parameter(3)\n  %ag.2",
    ).replace("ROOT %dot.1 = bf16[8,128]{1,0:T(8,128)(2,1)}", "ROOT %dot.1 = bf16[4,256,4,32]{3,2,1,0}")  # fmt: skip
    assert total(text).flops == 5 * 2 * (4 * 256) * 128 * (4 * 32)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded by 4.75G.", 20.5 * 2**30),
        ("memory required for HLO temporaries (595.79G) exceeds available HBM (95.74G).", 595.79 * 2**30),
        ("something else", 0.0),
    ],
)  # fmt: skip
def test_what_a_refused_program_asked_for(message: str, expected: float) -> None:
    """If it fails, a plan cannot say by how much a program does not fit."""
    assert needed_bytes(message) == expected
