"""What is of the GPU kernels alone: their decoding, how they cut lengths, that they lower for CUDA on a host without one.

Every backend's results, theirs too, are in `test_packed.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packed_cases import GRIDS, Shape, activation, exact, weight

from gemma_qat import kernels
from gemma_qat.kernels import Problem, gpu, gpu_grouped, gpu_matmul, gpu_top
from gemma_qat.kernels.gpu_block import has_no_products_to_round, small_values, stored_values
from gemma_qat.kernels.gpu_grouped import visits
from gemma_qat.kernels.gpu_tiling import tiling
from gemma_qat.kernels.problem import codes_in, half
from gemma_qat.numerics import Grid, PackedArray

FORMATS = ("q4_0", "int4 tile 32", "int4", "int2", "int8")
SIZES = {
    # (O, R): widths 1536, 2816, 3840, 5376, feed-forward 2112, 6144, 12288, 15360, 21504
    "E2B": ((2048, 1536), (1536, 2048), (256, 1536), (6144, 1536), (12288, 1536), (1536, 6144)),
    "12B": ((15360, 3840), (3840, 15360)),
    "26B A4B": ((2112, 2816), (2816, 2112)),
    "31B": ((21504, 5376), (5376, 21504)),
}
LENGTHS = [(name, *size) for name, sizes in SIZES.items() for size in sizes]
EXPERTS = ((704, 2816), (2816, 704))


def shapes(name: str, outputs: int, reduced: int, experts: int = 0) -> PackedArray:
    """A packed table [O, R] or experts [E, R, O] of which there are only shapes."""
    grid = GRIDS[name]
    lead = (experts,) if experts else ()
    tiles = 1 if grid.tile is None else reduced // grid.tile
    return PackedArray(
        words=jax.ShapeDtypeStruct((*lead, outputs, reduced * grid.number.bits // 8), jnp.uint8),
        scale=jax.ShapeDtypeStruct((*lead, outputs, tiles), grid.scale_dtype),
        grid=grid, shape=(*lead, reduced, outputs) if lead else (outputs, reduced), reduced=(1,),
    )  # fmt: skip


def lowered(operation: Any, *arguments: Any) -> str:
    """The program of an operation for CUDA, by this backend."""
    with kernels.using("gpu"):
        traced = jax.jit(operation).trace(*arguments)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def lower_matmul(name: str, outputs: int, reduced: int, rows: int, dtype: str) -> str:
    equation = "MD,VD->MV"
    operation = functools.partial(
        kernels.integer_matmul if dtype == "int8" else kernels.matmul, equation
    )
    x = jax.ShapeDtypeStruct((rows, reduced), dtype)
    return lowered(operation, x, shapes(name, outputs, reduced))


@pytest.mark.parametrize("name", FORMATS)
def test_kernels_lower_for_cuda(name: str) -> None:
    """Broken: Triton is given what it cannot lower, and decoding fails on every GPU."""
    for rows, dtype in ((1, "bfloat16"), (64, "bfloat16")):
        assert "gpu_packed_matmul" in lower_matmul(name, 1536, 6144, rows, dtype)
    x = jax.ShapeDtypeStruct((8, 2816), jnp.bfloat16)
    sizes = jax.ShapeDtypeStruct((128,), jnp.int32)
    found = lowered(kernels.grouped_matmul, x, shapes(name, 704, 2816, experts=128), sizes)
    assert "gpu_packed_grouped_matmul" in found
    top = functools.partial(kernels.top, k=1, cap=30.0)
    x = jax.ShapeDtypeStruct((1, 1536), jnp.bfloat16)
    assert "gpu_packed_top" in lowered(top, x, shapes(name, 262144, 1536))


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 2, 8, 9, 64])
@pytest.mark.parametrize("name", FORMATS)
def test_real_shapes_lower_for_cuda(name: str, rows: int) -> None:
    """Each length that Gemma 4 has; those that are no power of two are masked."""
    for _, outputs, reduced in LENGTHS:
        for dtype in ("bfloat16", "float32"):
            lower_matmul(name, outputs, reduced, rows, dtype)
        if name in ("int4", "int2", "int8"):
            lower_matmul(name, outputs, reduced, rows, "int8")
    sizes = jax.ShapeDtypeStruct((128,), jnp.int32)
    for outputs, reduced in EXPERTS:
        x = jax.ShapeDtypeStruct((rows, reduced), jnp.bfloat16)
        lowered(kernels.grouped_matmul, x, shapes(name, outputs, reduced, experts=128), sizes)
    for k in (1, 64):
        for width in (1536, 2816, 3840, 5376):
            x = jax.ShapeDtypeStruct((rows, width), jnp.bfloat16)
            lowered(functools.partial(kernels.top, k=k, cap=30.0), x, shapes(name, 262144, width))


def test_a_program_for_cuda_has_the_kernel_unasked() -> None:
    """Broken: on a GPU nobody gets these kernels, or a program for CPU drags them along."""
    packed = shapes("q4_0", 256, 1536)
    x = jax.ShapeDtypeStruct((1, 1536), jnp.bfloat16)
    traced = jax.jit(functools.partial(kernels.matmul, "MD,VD->MV")).trace(x, packed)
    cuda = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "xla.gpu.triton" in cuda and "gpu_packed_matmul" in cuda
    assert "gpu_packed_matmul" not in traced.lower(lowering_platforms=("cpu",)).as_text()


def test_kernels_lower_inside_shard_map() -> None:
    """Broken: packed experts that are spread over devices cannot be traced, on no platform."""
    mesh = jax.make_mesh((1,), ("e",), axis_types=(jax.sharding.AxisType.Auto,))
    packed = shapes("q4_0", 704, 2816, experts=128)

    def local(x: jax.Array, own: PackedArray, sizes: jax.Array) -> jax.Array:
        return kernels.grouped_matmul(x, own, sizes)[None]

    spread, whole = jax.sharding.PartitionSpec("e"), jax.sharding.PartitionSpec()
    found = lowered(
        jax.shard_map(local, mesh=mesh, in_specs=(whole, spread, spread), out_specs=spread),
        jax.ShapeDtypeStruct((8, 2816), jnp.bfloat16), packed,
        jax.ShapeDtypeStruct((128,), jnp.int32),
    )  # fmt: skip
    assert "gpu_packed_grouped_matmul" in found


@pytest.mark.parametrize("name", [name for name in GRIDS if name != "q6_k"])
def test_decoding_is_exact(name: str) -> None:
    """The code in every slot of every byte, read out of a float's mantissa, is the code that a shift gives."""
    grid = GRIDS[name]
    words = jnp.arange(256, dtype=jnp.int32)
    for slot in range(8 // grid.number.bits):
        found = jax.jit(stored_values, static_argnums=(1, 2))(words, grid, slot)
        expected = np.asarray(codes_in(words, grid, slot), np.float64) - half(grid)
        np.testing.assert_array_equal(np.asarray(found, np.float64), expected)
        if has_no_products_to_round(grid):
            found = jax.jit(small_values, static_argnums=(1, 2))(
                words.astype(jnp.uint8), grid, slot
            )
            np.testing.assert_array_equal(np.asarray(found, np.float64), expected)


def test_sums_are_scaled_only_where_that_is_the_same() -> None:
    """Broken: numbers are multiplied that training never saw, or two-bit weights are decoded at half the speed."""
    scaled_last = {name for name, grid in GRIDS.items() if has_no_products_to_round(grid)}
    assert scaled_last == {"int2", "ternary"}
    scale = jnp.asarray(np.random.default_rng(3).lognormal(0, 4, 1000), jnp.float32)
    for code in (-2.0, -1.0, 0.0, 1.0):
        products = (code * scale).astype(jnp.bfloat16)
        np.testing.assert_array_equal(products, jnp.bfloat16(code) * scale.astype(jnp.bfloat16))


@pytest.mark.parametrize("rows", [1, 3, 8, 9, 33, 64])
def test_every_byte_is_walked_once(rows: int) -> None:
    """Broken: some of a row of words is left out; or most of a walk is past its end."""
    for name in FORMATS:
        for _, outputs, reduced in LENGTHS:
            problem = Problem(
                rows=rows, outputs=outputs, reduced=reduced, grid=GRIDS[name], dtype="bfloat16"
            )
            width = reduced * problem.bits // 8
            cut = tiling(problem, width, rows=rows, may_split=True)
            assert width <= cut.walked < width + cut.splits * cut.chunk + width / 8
            for side in (cut.chunk, cut.outputs):
                assert math.log2(side).is_integer() and side >= 16
            alone = tiling(problem, width, rows=rows, may_split=False)
            assert alone.splits == 1 and width <= alone.walked < width * 9 / 8


@pytest.mark.parametrize("most", [1, 2, 4])
@pytest.mark.parametrize("groups", [(2, 0, 3, 1), (0, 6, 0, 0), (0, 0, 0, 0), (0, 4, 1, 0)])
def test_visits_cover_each_row_once(groups: tuple[int, ...], most: int) -> None:
    """Each row that has an expert is in one visit, of its own expert; an expert without rows is not visited."""
    found = np.asarray(visits(jnp.asarray(groups), 7, most))
    expert = np.repeat(np.arange(4), groups)
    seen = [(e, r + n) for e, r, count in found.T for n in range(count)]
    assert seen == list(zip(expert, range(len(expert)), strict=True))
    assert np.all((found[0] >= 0) & (found[0] < 4) & (found[2] <= most))


SPLIT = {
    "split, past the end": (Shape(1, (2112,), (40,)), "q4_0", "bfloat16"),
    "split, past the end, float32": (Shape(2, (704,), (40,)), "q4_0", "float32"),
    "split, two-bit tiles": (Shape(2, (1536,), (24,)), "int2 tile 32, bfloat16 scales", "bfloat16"),
    "many rows past the end": (Shape(33, (704,), (72,)), "q8_0", "bfloat16"),
    "many rows, float32": (Shape(9, (704,), (40,)), "int4 tile 32", "float32"),
    "experts apart, float32": (Shape(3, (96,), (17,), (0,) * 9 + (1, 0, 2)), "q4_0", "float32"),
    "experts of many rows": (Shape(20, (96,), (40,), (17, 0, 2)), "q4_0", "bfloat16"),
}


@pytest.mark.parametrize(("shape", "name", "dtype"), SPLIT.values(), ids=SPLIT)
def test_products_however_they_are_cut(shape: Shape, name: str, dtype: str) -> None:
    """As `test_products` of all backends, at sizes that this one cuts in its other ways."""
    packed, x = weight(shape, GRIDS[name]), activation(shape, dtype)
    with kernels.using("gpu"):
        if shape.groups:
            groups = jnp.asarray(shape.groups)
            found = jax.jit(gpu_grouped.grouped_matmul)(x, packed, groups)
        else:
            found = jax.jit(functools.partial(gpu_matmul.matmul, shape.equation))(x, packed)
    product, size = exact(x, packed, shape)
    got = np.asarray(found, np.float64).reshape(shape.rows, -1)[: len(product)]
    # A float32 sum in any order.
    assert np.all(np.abs(got - product) <= np.prod(shape.reduced) * 2.0**-24 * size)


def test_the_gradient_is_the_definitions() -> None:
    """Broken: what is differentiated through a packed weight cannot be traced, on no platform."""
    shape, groups = Shape(6, (64,), (24,), (2, 0, 3, 1)), jnp.asarray((2, 0, 3, 1))
    packed, x = weight(shape, GRIDS["q4_0"]), activation(shape, "float32")

    def loss(x: jax.Array, scale: jax.Array, operation: Any) -> jax.Array:
        out = operation(x, dataclasses.replace(packed, scale=scale), groups)
        return jnp.sum(out * jnp.sin(jnp.arange(out.size, dtype=jnp.float32).reshape(out.shape)))

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)
    with kernels.using("gpu"):
        found = gradient(x, packed.scale, kernels.grouped_matmul)
    expected = gradient(x, packed.scale, kernels.reference.grouped_matmul)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_what_is_differentiated_can_be_traced_for_every_platform() -> None:
    """Broken: a gradient through a packed weight fails on a CPU, for the sake of a kernel it never runs."""
    packed = weight(Shape(1, (64,), (24,)), GRIDS["q4_0"])
    x = activation(Shape(2, (64,), ()), "float32")
    found = jax.jit(jax.grad(lambda x: jnp.sum(kernels.matmul("MR,RO->MO", x, packed))))(x)
    expected = np.sum(np.asarray(packed.dequantize(), np.float64), axis=1)
    np.testing.assert_allclose(found, np.stack([expected, expected]), atol=64 * 2.0**-20)


@pytest.mark.parametrize("rows", [3, 20])
def test_the_largest_logit_is_the_first_of_equal_ones(rows: int) -> None:
    """Broken: greedy decoding depends on which program came first; capped logits are often equal."""
    packed = weight(Shape(rows, (64,), (100,)), GRIDS["int4"])
    packed = PackedArray(
        words=packed.words, scale=packed.scale, grid=packed.grid, shape=(100, 64), reduced=(1,)
    )
    x = 20 * activation(Shape(rows, (64,), ()), "float32")
    values, ids = jax.jit(functools.partial(gpu_top.top, k=1, cap=2.0))(x, packed)
    many, expected = kernels.reference.top(x, packed, 3, 2.0)
    assert np.all(np.asarray(many) == 2.0)  # capped so low, that there are equal ones
    np.testing.assert_array_equal(values, many[:, :1])
    np.testing.assert_array_equal(ids, expected[:, :1])


@pytest.mark.parametrize(
    ("operation", "changes", "why"),
    [
        ("matmul", {"rows": 65}, "65 rows, at most 64"),
        ("top", {"rows": 65}, "65 rows, at most 64"),
        ("matmul", {"grid": GRIDS["q6_k"]}, "q6_k, tile 16: codes do not sit in whole bytes"),
        ("matmul", {"dtype": "float16"}, "float16, one of float32, bfloat16 expected"),
        ("integer_matmul", {"dtype": "int8"}, "q4_0, tile 32: one scale a row"),
        ("matmul", {"outputs": 2**20, "reduced": 2**12}, "2 GiB of words or more"),
        ("matmul", {}, None),
    ],
)
def test_what_is_refused_is_said(operation: str, changes: dict[str, Any], why: str | None) -> None:
    """Broken: a problem the kernels do wrong, or do not lower for, is given to them."""
    base = {"rows": 1, "outputs": 8, "reduced": 32, "grid": GRIDS["q4_0"], "dtype": "float32"}
    found = gpu.refuses(operation, Problem(**(base | changes)))
    assert found == why if why is None else why in (found or "")


def test_a_tile_that_is_no_power_of_two_is_refused() -> None:
    """Broken: Triton is given sides it cannot have."""
    grid = Grid(format="int4", tile=48)
    problem = Problem(rows=1, outputs=8, reduced=96, grid=grid, dtype="float32")
    assert "a tile of 24 bytes" in (gpu.refuses("matmul", problem) or "")
