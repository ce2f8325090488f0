"""Kernels in a loop over layers, by the real compiler: a layer's words are read where they lie in the stack."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tpu_process import needs_compiler, printed

PROGRAM = r"""
import dataclasses, json, re
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from gemma_qat import kernels
from gemma_qat.numerics import Grid, PackedArray

LAYERS = 3

def program(place, operation, format, rows, outputs, reduced, dtype, experts=0):
    grid = Grid(format=format)
    lead = (experts,) if experts else ()
    def array(shape, dtype):
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=place)
    packed = PackedArray(
        words=array((LAYERS, *lead, *outputs, reduced * grid.number.bits // 8), "uint8"),
        scale=array((LAYERS, *lead, *outputs, grid.tiles(reduced)), grid.scale_dtype),
        grid=grid, shape=(*lead, reduced, *outputs), reduced=(len(lead),),
    )
    def run(x, packed, *sizes):
        def body(x, layer):
            own = dataclasses.replace(packed, layer=layer)
            equation = "MR,ROP->MOP" if len(outputs) > 1 else "MR,RO->MO"
            first = () if experts else (equation,)
            out = getattr(kernels, operation)(*first, x, own, *sizes)
            return x + jnp.max(out).astype(x.dtype), None
        return jax.lax.scan(body, x, jnp.arange(LAYERS))[0]
    sizes = (array((experts,), "int32"),) if experts else ()
    return jax.jit(run).lower(array((rows, reduced), dtype), packed, *sizes)

def wrong(text):
    # Inside the loop: anything that makes words, or scales of a whole stack.
    if '"tpu_custom_call"' not in text:
        return ["no kernel"]
    made = r"= \(?(u8\[|(?:u16|f16|f32)\[(?:%d|%d),)[^=]* (copy|fusion|transpose|dynamic-slice|bitcast-convert)\("
    made = made % (LAYERS, LAYERS * 128)
    return [line.strip()[:120] for line in text.splitlines() if "while/body" in line and re.search(made, line)]

place = SingleDeviceSharding(topologies.get_topology_desc(platform="tpu", topology_name=CHIP).devices[0])
print(json.dumps({str(case): wrong(program(place, *case).compile().as_text()) for case in json.loads(CASES)}))
"""

CASES: list[list[Any]] = [
    ["matmul", "q4_0", 1, [6144], 1536, "bfloat16"],
    ["matmul", "int2", 8, [8, 256], 1536, "bfloat16"],
    ["integer_matmul", "int4", 8, [2112], 2816, "int8"],
    ["grouped_matmul", "q4_0", 8, [2816], 704, "bfloat16", 128],
    ["grouped_matmul", "q4_0", 8, [1408], 2816, "bfloat16", 128],
    ["integer_grouped_matmul", "int8", 8, [1408], 2816, "int8", 128],
]


@needs_compiler
@pytest.mark.parametrize(
    "chip", ["v5e:2x2", *(pytest.param(c, marks=pytest.mark.slow) for c in ("v5p:2x2x1", "v6e:2x2"))]
)  # fmt: skip
def test_no_layer_is_copied_out_of_its_stack(chip: str) -> None:
    """If it fails, a decode step reads, writes and reads again every weight, and is three times as slow as memory."""
    found = printed(f"CHIP = {chip!r}\nCASES = {json.dumps(CASES)!r}\n{PROGRAM}")
    assert len(found) == len(CASES)
    assert not any(found.values()), found


TABLE = r"""
import json
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from gemma_qat import kernels
from gemma_qat.numerics import Grid, PackedArray

place = SingleDeviceSharding(topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0])
def array(shape, dtype):
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=place)
found = {}
for format, width in (("int4", 35 * 256), ("int2", 1536), ("q4_0", 1536)):
    grid = Grid(format=format)
    words = array((262144, width * grid.number.bits // 8), "uint8")
    scale = array((262144, grid.tiles(width)), grid.scale_dtype)
    packed = PackedArray(words=words, scale=scale, grid=grid, shape=(262144, width), reduced=(1,))
    program = jax.jit(kernels.rows).lower(packed, array((8, 1), "int32")).compile()
    found[format] = [program.memory_analysis().temp_size_in_bytes, 4 * 8 * width]
print(json.dumps(found))
"""


@needs_compiler
def test_rows_of_tables_are_gathered_and_no_table_is_moved() -> None:
    """XLA's gather of words is the kernel: its temporaries are those of some rows, of tables of 0.1 to 1.2 GB."""
    for format, (temporaries, rows) in printed(TABLE).items():
        assert temporaries <= 8 * rows, format
