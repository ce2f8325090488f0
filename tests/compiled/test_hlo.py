"""Reading the text of compiled programs: shapes, what a program says of itself, and what is no program."""

from __future__ import annotations

from pathlib import Path

import pytest

from gemma_qat.compiled import Shape, parse
from gemma_qat.compiled.hlo import shapes_of

TPU = Path(__file__).parent / "texts" / "tpu.txt"


def test_shapes_with_layouts_and_memory_spaces() -> None:
    """If it fails, on-chip arrays are counted as traffic of HBM, or the other way round."""
    text = "(s32[]{:T(128)}, bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, s4[6]{0:S(0)}, token[])"
    found = shapes_of(text)
    assert found[1] == Shape("bf16", (2, 3), False)
    assert [shape.bytes for shape in found] == [4, 12, 3, 0]
    assert found[2].in_hbm and str(found[1]) == "bf16[2,3]"


def test_what_a_program_says_of_itself() -> None:
    """If it fails, a message among all devices is one among none, or a program begins somewhere else."""
    module = parse(TPU.read_text("utf-8"))
    assert (module.entry, module.devices) == ("main", 4)
    start = module.computations["main"]["start"]
    assert (start.op, start.operands, len(start.shapes)) == ("tuple", ("none", "x", "w"), 3)
    both = "HloModule m, replica_count=2, num_partitions=3\n\nENTRY %e (a: f32[]) -> f32[] {\n}"
    assert parse(both).devices == 6


def test_other_text_is_refused() -> None:
    """If it fails, a program that was only lowered is said to move nothing."""
    lowered = "module @jit_step {\n  %0 = stablehlo.add %a, %b : tensor<f32>\n}"
    with pytest.raises(ValueError, match="no ENTRY computation"):
        parse(lowered)
