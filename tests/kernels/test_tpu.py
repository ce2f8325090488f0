"""The TPU kernels by the real compiler, at the shapes of the released models. Needs no TPU."""

from __future__ import annotations

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packed_cases import Shape, activation, exact, weight
from tpu_process import needs_compiler, printed

from gemma_qat import kernels
from gemma_qat.kernels import Problem, choose, tpu_blocks
from gemma_qat.kernels.tpu_decode import _from_float16
from gemma_qat.kernels.tpu_grouped import chosen_experts
from gemma_qat.numerics import Grid

PROGRAM = """
import dataclasses, json, re
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.experimental.layout import Format
from jax.sharding import SingleDeviceSharding
from gemma_qat import kernels
from gemma_qat.kernels.tpu_layouts import layouts
from gemma_qat.numerics import Grid, PackedArray

GRIDS = {
    "q4_0": Grid(format="q4_0"), "int4 tile 32": Grid(format="int4", tile=32), "int4": Grid(format="int4"),
    "int2": Grid(format="int2"), "int8": Grid(format="int8"), "q8_0": Grid(format="q8_0"),
    "int2_no_zero": Grid(format="int2_no_zero"), "int4 tile 128": Grid(format="int4", tile=128),
}

def program(place, operation, grid, rows, outputs, reduced, dtype, experts=0, k=1, laid=False):
    grid = GRIDS[grid]
    lead = (experts,) if experts else ()
    outputs = tuple(outputs) if isinstance(outputs, list) else (outputs,)
    def array(shape, dtype, sharding=place):
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)
    top = operation == "top"
    packed = PackedArray(
        words=array((*lead, *outputs, reduced * grid.number.bits // 8), "uint8"),
        scale=array((*lead, *outputs, grid.tiles(reduced)), grid.scale_dtype),
        grid=grid, shape=(*outputs, reduced) if top else (*lead, reduced, *outputs), reduced=(1,) if top else (len(lead),),
    )
    if laid:
        ours = [array(a.shape, a.dtype, Format(layout, place)) for a, layout in zip((packed.words, packed.scale), layouts(packed))]
        packed = dataclasses.replace(packed, words=ours[0], scale=ours[1])
    x = array((rows, reduced), dtype)
    if top:
        return jax.jit(lambda x, w: kernels.top(x, w, k=k, cap=30.0)).lower(x, packed)
    if experts:
        return jax.jit(kernels.grouped_matmul).lower(x, packed, array((experts,), "int32"))
    equation = "MR,ROP->MOP" if len(outputs) > 1 else "MR,RO->MO"
    return jax.jit(lambda x, w: getattr(kernels, operation)(equation, x, w)).lower(x, packed)

def compiled(place, *case):
    # What is wrong with a program: nothing, no kernel in it, or words that are laid another way first.
    text = program(place, *case).compile().as_text()
    if '"tpu_custom_call"' not in text:
        return "no kernel"
    moved = [line.strip()[:100] for line in text.splitlines() if re.search(r"= \\(?u8\\[[^=]* (copy|fusion|transpose)\\(", line)]
    return "; ".join(moved)

found = {}
for chip, case in json.loads(CASES):
    place = SingleDeviceSharding(topologies.get_topology_desc(platform="tpu", topology_name=chip).devices[0])
    found[f"{chip} {case}"] = compiled(place, *case)
print(json.dumps(found))
"""

CHIPS = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")

FORMATS = ("q4_0", "int4 tile 32", "int4", "int2", "int8")

FEW = [
    ("v5e:2x2", ["matmul", "q4_0", 1, 6144, 1536, "bfloat16"]),
    ("v5e:2x2", ["matmul", "q4_0", 64, 1536, 4096, "float32"]),
    ("v5p:2x2x1", ["matmul", "int2", 8, 3840, 8192, "bfloat16"]),
    ("v6e:2x2", ["matmul", "int4", 3, 2816, 2112, "float32"]),
    ("v5p:2x2x1", ["integer_matmul", "int4", 8, 2112, 2816, "int8"]),
    ("v6e:2x2", ["integer_matmul", "int2", 1, 1536, 256, "int8"]),
    ("v5e:2x2", ["grouped_matmul", "q4_0", 8, 2816, 704, "bfloat16", 128]),
    ("v6e:2x2", ["grouped_matmul", "int8", 64, 704, 2816, "bfloat16", 128]),
    ("v5p:2x2x1", ["top", "int2", 1, 262144, 1536, "bfloat16"]),
]

UNLIKE = [
    ["grouped_matmul", "int2", 8, 704, 2816, "bfloat16", 128],
    ["matmul", "int2", 8, [16, 256], 3840, "bfloat16", 0],
]
"""Where the compiler's own order of axes is not one a kernel reads in."""


@needs_compiler
def test_it_compiles_for_chips() -> None:
    """Each kernel, and no copy of words in front of it: they are read as the compiler lays them, or as we told it to."""
    unlike = [("v6e:2x2", [*case, 1, laid]) for case in UNLIKE for laid in (False, True)]
    found = printed(f"CASES = {json.dumps([*FEW, *unlike])!r}\n{PROGRAM}")
    wrong = {case for case, wrong in found.items() if wrong}
    assert len(found) == len(FEW) + 4
    assert wrong == {f"{chip} {case}" for chip, case in unlike if not case[-1]}, found


SIDES = {
    "E2B": [(2048, 1536), (4096, 1536), (1536, 2048), (1536, 4096), (256, 1536), (512, 1536), (6144, 1536),
            (12288, 1536), (1536, 6144), (1536, 12288), (1536, 256)],
    "12B": [(4096, 3840), (8192, 3840), (3840, 4096), (3840, 8192), (2048, 3840), (512, 3840), (15360, 3840),
            (3840, 15360)],
    "26B A4B": [(4096, 2816), (8192, 2816), (2816, 4096), (2816, 8192), (2112, 2816), (2816, 2112)],
    "31B": [(8192, 5376), (16384, 5376), (5376, 8192), (5376, 16384), (4096, 5376), (2048, 5376), (21504, 5376),
            (5376, 21504)],
}  # fmt: skip
"""Outputs and reduced axis of every contraction of a size."""


def test_no_shape_of_a_released_model_is_refused() -> None:
    """At the most rows there may be, in every format but the one whose codes are spread over bytes."""
    grids = [Grid(format=name) for name in ("q4_0", "q8_0", "int8", "int4", "int2", "int2_no_zero", "ternary")]  # fmt: skip
    grids += [Grid(format="int4", tile=32), Grid(format="int2", tile=32)]
    for outputs, reduced in (side for sides in SIDES.values() for side in sides):
        for grid in grids:
            problem = Problem(rows=64, outputs=outputs, reduced=reduced, grid=grid, dtype="float32")
            assert tpu_blocks.refuses("matmul", problem) is None, problem


@pytest.mark.parametrize(
    ("operation", "changes", "why"),
    [
        ("top", {"rows": 65}, "65 rows, at most 64"),
        ("matmul", {"grid": Grid(format="q6_k")}, "q6_k: codes are spread over bytes"),
        ("matmul", {"grid": Grid(format="int4", tile=48)}, "tile 48: a power of two expected"),
        ("matmul", {"grid": Grid(format="int2", tile=16)}, "tile 16: 4 bytes, a multiple of 8"),
        ("matmul", {"dtype": "float16"}, "activations of float16"),
        ("matmul", {"rows": 64, "reduced": 2**17}, "64 rows of 131072: blocks of .* bytes, at most"),
        ("integer_matmul", {}, "codes of float32, int8 expected"),
        ("integer_matmul", {"dtype": "int8"}, "integer sums need one scale for an output, and a code for zero"),
    ],
)  # fmt: skip
def test_what_is_refused_is_said(operation: str, changes: dict, why: str) -> None:
    """Broken: nobody learns why a slow path was taken."""
    base = {"rows": 1, "outputs": 8, "reduced": 96, "grid": Grid(format="q4_0"), "dtype": "float32"}
    said = tpu_blocks.refuses(operation, Problem(**(base | changes)))
    assert said is not None and re.match(why, said), said


def test_kernels_are_interpreted_where_there_is_no_tpu() -> None:
    """By the platform a program is for, not the one it is made on: else none could be compiled here."""
    problem = Problem(rows=1, outputs=8, reduced=32, grid=Grid(format="q4_0"), dtype="float32")
    assert choose("matmul", problem, "tpu").backend.name == "tpu"
    assert choose("matmul", problem, "cpu").backend.name != "tpu"
    with kernels.using("tpu"):
        assert [choose("matmul", problem, on).interpret for on in ("cpu", "tpu")] == [True, False]


@pytest.mark.parametrize(
    ("grid", "reduced", "outputs", "turned"),
    [
        (Grid(format="q4_0"), 8192, 40, (False, False)),
        (Grid(format="int4", tile=128), 8320, 128, (True, True)),
        pytest.param(Grid(format="int4", tile=128), 8192, 40, (False, True), marks=pytest.mark.slow),
        pytest.param(Grid(format="q4_0"), 4096, 40, (False, False), marks=pytest.mark.slow),
        pytest.param(Grid(format="int8"), 8292, 40, (False, True), marks=pytest.mark.slow),
        pytest.param(Grid(format="int2"), 8200, 256, (True, True), marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_rows_of_several_chunks(
    grid: Grid, reduced: int, outputs: int, turned: tuple[bool, bool]
) -> None:
    """Words and scales that lie either way, whole chunks and a last one; within a float32 sum in any order."""
    shape = Shape(2, (reduced,), (outputs,))
    packed, x = weight(shape, grid), activation(shape, "float32")
    lying = tpu_blocks.operands(x, packed).lying
    assert (lying.words_turned, lying.scale_turned) == turned
    with kernels.using("tpu"):
        product_of = jax.jit(functools.partial(kernels.matmul, shape.equation))
        found = product_of(x, packed)
    product, size = exact(x, packed, shape)
    assert np.all(np.abs(np.asarray(found, np.float64) - product) <= reduced * 2.0**-24 * size)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("size", SIDES)
def test_every_shape_of_a_size_compiles(size: str, chip: str) -> None:
    """All formats at the most and fewest rows, the head and the experts among them."""
    cases: list[list] = []
    for grid in (*FORMATS, "q8_0", "int2_no_zero", "int4 tile 128"):
        for outputs, reduced in SIDES[size]:
            if grid == "int4 tile 128" and reduced % 128:
                continue
            cases.append(["matmul", grid, 1, outputs, reduced, "bfloat16"])
            cases.append(["matmul", grid, 64, outputs, reduced, "float32"])
            if grid in ("int4", "int2", "int8"):
                cases.append(["integer_matmul", grid, 8, outputs, reduced, "int8"])
        width = SIDES[size][0][1]
        cases.append(["top", grid, 1, 262144, width, "bfloat16"])
    cases.append(["top", "q4_0", 8, 262144, SIDES[size][0][1], "float32", 0, 64])
    if size == "26B A4B":
        for grid in FORMATS:
            cases.append(["grouped_matmul", grid, 8, 2816, 704, "bfloat16", 128])
            cases.append(["grouped_matmul", grid, 64, 704, 2816, "float32", 128])
    found = printed(f"CASES = {json.dumps([(chip, case) for case in cases])!r}\n{PROGRAM}")
    # 704 by 704 bytes of 128 experts: the compiler lays experts along lanes, as no other axis fills them.
    known = f"{chip} {['grouped_matmul', 'int2', 64, 704, 2816, 'float32', 128]}"
    wrong = {case for case, wrong in found.items() if wrong}
    assert wrong == ({known} if size == "26B A4B" else set())


def test_every_finite_float16_is_widened_exactly() -> None:
    """All 63488 of them, zeros of both signs and subnormal ones too."""
    bits = np.arange(2**16, dtype=np.uint16)
    bits = bits[np.isfinite(bits.view(np.float16))]
    expected = bits.view(np.float16).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(_from_float16(jnp.asarray(bits))), expected)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((2, 0, 3, 1), [[0, 2, 3, 3], [0, 2, 5, 6], [2, 5, 6, 6]]),
        ((0, 0, 4, 0), [[2, 2, 2, 2], [0, 4, 4, 4], [4, 4, 4, 4]]),
        ((0, 0, 0, 0), [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]),
    ],
)
def test_steps_past_the_chosen_experts_stay(
    sizes: tuple[int, ...], expected: list[list[int]]
) -> None:
    """Broken: words of an expert that nobody chose are read, or rows are given to two."""
    found = jax.jit(chosen_experts, static_argnums=1)(jnp.asarray(sizes), 4)
    np.testing.assert_array_equal(found, expected)
