"""Every backend on every format and shape, against float64 and the definition's own bound."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packed_cases import GRIDS, SHAPES, Shape, activation, exact, spanning, weight

from gemma_qat import kernels
from gemma_qat.errors import InputError
from gemma_qat.kernels import BACKENDS, Problem, choose
from gemma_qat.kernels.tpu_layouts import laid_out
from gemma_qat.numerics import Grid, PackedArray, pack, quantize

NAMES = [backend.name for backend in BACKENDS]
ULP = {"float32": 2.0**-24, "bfloat16": 2.0**-8}
"""Half a unit in the last place, relative to the least number that has it, of the dtype a result is rounded to."""


def traced(operation: str, **settings: Any) -> Any:
    """An operation, jitted as a function of its own: jax would not trace one again for another backend."""
    return jax.jit(functools.partial(getattr(kernels, operation), **settings))


def taken(backend: str, operation: str, x: jax.Array, packed: PackedArray) -> None:
    """Skips what a backend refuses, with its reason."""
    problem = kernels.problem_of(x, packed)
    (row,) = [row for row in BACKENDS if row.name == backend]
    no = "it has none" if operation not in row.operations else row.refuses(operation, problem)
    if no is not None:
        pytest.skip(f"{backend} refuses {operation}: {no}")


@pytest.mark.parametrize(
    ("grid", "shape", "dtype"),
    spanning(GRIDS, SHAPES, {"float32": "float32", "bfloat16": "bfloat16"}),
)
@pytest.mark.parametrize("backend", NAMES)
def test_products(backend: str, grid: Grid, shape: Shape, dtype: str) -> None:
    """Within a float32 sum in any order (n 2^-24 of the sum of magnitudes) and one rounding to the result's dtype."""
    if (grid.tile or 1) * grid.number.super_tiles > np.prod(shape.reduced) or np.prod(
        shape.reduced
    ) % ((grid.tile or 1) * grid.number.super_tiles):
        pytest.skip("no whole tile in so few elements")
    packed, x = weight(shape, grid), activation(shape, dtype)
    operation = "grouped_matmul" if shape.groups else "matmul"
    taken(backend, operation, x, packed)
    more = (
        {"group_sizes": jnp.asarray(shape.groups)} if shape.groups else {"equation": shape.equation}
    )
    with kernels.using(backend):
        found = traced(operation, **more)(lhs=x, packed=packed)
    assert found.dtype == x.dtype and found.shape == (shape.rows, *shape.outputs)
    product, size = exact(x, packed, shape)
    got = np.asarray(found, np.float64).reshape(shape.rows, -1)[: len(product)]
    n = np.prod(shape.reduced)
    bound = n * 2.0**-24 * size + ULP[dtype] * (np.abs(product) + n * 2.0**-24 * size)
    assert np.all(np.abs(got - product) <= bound)


@pytest.mark.parametrize(
    ("grid", "shape"),
    spanning(
        {name: GRIDS[name] for name in ("int8", "int4", "int2", "ternary")},
        SHAPES,
    ),
)
@pytest.mark.parametrize("backend", NAMES)
def test_integer_sums_are_exact(backend: str, grid: Grid, shape: Shape) -> None:
    """Codes of both sides, -128 among them, summed without a rounding."""
    packed, x = weight(shape, grid), activation(shape, "int8")
    operation = "integer_grouped_matmul" if shape.groups else "integer_matmul"
    taken(backend, operation, x, packed)
    more = (
        {"group_sizes": jnp.asarray(shape.groups)} if shape.groups else {"equation": shape.equation}
    )
    with kernels.using(backend):
        found = traced(operation, **more)(codes=x, packed=packed)
    codes = dataclasses.replace(
        packed, scale=jnp.ones_like(packed.scale)
    )  # whose values are the codes themselves
    expected, _ = exact(x.astype(jnp.float32), codes, shape)
    assert found.dtype == jnp.int32
    got = np.asarray(found).reshape(shape.rows, -1)[: len(expected)]
    np.testing.assert_array_equal(got, expected)


def head(grid: Grid, vocab: int, width: int) -> PackedArray:
    """A packed table in which row 7 stands twice more, so that equal logits occur."""
    table = np.random.default_rng(5).standard_normal((vocab, width)).astype(np.float32)
    table[[20, vocab - 1]] = table[7]
    return pack(quantize(jnp.asarray(table), grid, (1,)))


@pytest.mark.parametrize(
    ("grid", "size", "cap"),
    spanning(
        {name: GRIDS[name] for name in ("int2", "q4_0", "int4", "q6_k")},
        {"1 of 64": (64, 1), "5 of 301": (301, 5), "64 of 1030": (1030, 64)},
        {"no cap": None, "cap": 30.0},
    ),
)
@pytest.mark.parametrize("backend", NAMES)
def test_the_largest_logits(
    backend: str, grid: Grid, size: tuple[int, int], cap: float | None
) -> None:
    """The largest first and the lower id of equal ones, as a sort of all logits gives them."""
    vocab, k = size
    packed = head(grid, vocab, 256)
    x = activation(Shape(3, (256,), ()), "float32")
    taken(backend, "top", x, packed)
    with kernels.using(backend):
        values, ids = traced("top", k=k, cap=cap)(x, packed)
        logits = np.asarray(kernels.reference.capped(kernels.matmul("MD,VD->MV", x, packed), cap))
    assert values.shape == ids.shape == (3, k)
    table = np.asarray(packed.dequantize(), np.float64)
    rows = np.asarray(x, np.float64)
    wide, magnitudes = rows @ table.T, np.abs(rows) @ np.abs(table).T
    bound = 256 * 2.0**-24 * magnitudes
    if cap is not None:
        wide, bound = cap * np.tanh(wide / cap), bound + 2.0**-20 * np.abs(wide)
    order = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    for row in range(3):
        own = np.asarray(ids[row])
        assert len(set(own.tolist())) == k
        assert np.all(
            np.abs(np.asarray(values[row], np.float64) - wide[row, own]) <= bound[row, own]
        )
        # No id left out is larger by more than both sums may be off.
        out = np.setdiff1d(np.arange(vocab), own)
        assert np.all(wide[row, out] - bound[row, out] <= (wide[row, own] + bound[row, own]).min())
        # Three rows of the table are equal: whatever the order of a sum, they give equal logits, in order of id.
        among = [i for i in own.tolist() if i in (7, 20, vocab - 1)]
        assert among == [7, 20, vocab - 1][: len(among)]
        np.testing.assert_array_equal(own[:1], order[row, :1])
    assert np.all(np.diff(np.asarray(values), axis=1) <= 0)


@pytest.mark.parametrize("backend", NAMES)
def test_a_larger_logit_pushes_equal_ones_down_in_order(backend: str) -> None:
    """Two equal rows, then a larger one, 128 apart, and two to be kept: the lower id of the equal ones stays."""
    sizes = np.full(700, -1.0)
    sizes[[5, 133, 261, 270]] = [0.5, 0.5, 1.0, 0.5]
    table = jnp.asarray(sizes[:, None] * np.ones(32), jnp.float32)
    packed, x = pack(quantize(table, GRIDS["int4"], (1,))), jnp.ones((1, 32))
    taken(backend, "top", x, packed)
    for k in (1, 2, 3):
        with kernels.using(backend):
            _, ids = traced("top", k=k, cap=None)(x, packed)
        assert np.asarray(ids).tolist() == [[261, 5, 133][:k]]


def test_rows_of_a_table() -> None:
    """A gather of words gives what dequantizing the table gives."""
    for name in ("q4_0", "int2", "q6_k"):
        packed = head(GRIDS[name], 64, 256)
        ids = jnp.asarray([[3, 63], [0, 3]])
        expected = np.asarray(packed.dequantize())[np.asarray(ids)]
        np.testing.assert_array_equal(kernels.rows(packed, ids), expected)


@pytest.mark.parametrize("shape", ["odd outputs", "experts"])
def test_another_layout_is_the_same_weight(shape: str) -> None:
    """If it fails, what is put where a TPU's kernels read it best is another weight. On CPU layouts are kept too."""
    case = SHAPES[shape]
    one = weight(case, GRIDS["q4_0"])
    stack = dataclasses.replace(
        one, words=jnp.stack([one.words, one.words ^ 1]), scale=jnp.stack([one.scale, one.scale])
    )
    put = laid_out(stack)
    formats = {array.format.layout.major_to_minor for array in (put.words, put.scale)}
    assert any(order != tuple(range(len(order))) for order in formats)  # q4_0's scales lie turned
    operation = "grouped_matmul" if case.groups else "matmul"
    more = {"group_sizes": jnp.asarray(case.groups)} if case.groups else {"equation": case.equation}
    x = activation(case, "float32")

    def found(packed: PackedArray, layer: int) -> np.ndarray:
        own = dataclasses.replace(packed, layer=jnp.int32(layer))
        return np.asarray(traced(operation, **more)(lhs=x, packed=own))

    np.testing.assert_array_equal(found(put, 0), found(stack, 0))
    np.testing.assert_array_equal(found(put, 1), found(stack, 1))
    assert not np.array_equal(found(put, 0), found(put, 1))


def problem(**changes: Any) -> Problem:
    base = {"rows": 1, "outputs": 8, "reduced": 32, "grid": GRIDS["q4_0"], "dtype": "float32"}
    return Problem(**(base | changes))


def test_a_choice_says_why() -> None:
    """Broken: nobody learns why a slow path was taken."""
    few = choose("matmul", problem(), "cpu")
    assert few.backend.name == "blocked" and "blocked takes it" in few.why
    many = choose("grouped_matmul", problem(rows=65, experts=4), "cpu")
    assert many.backend.name == "reference"
    assert "65 rows, at most 64: bound by arithmetic; reference takes it" in many.why
    with (
        pytest.raises(InputError, match="unknown backend 'blokced'.*nearest: blocked"),
        kernels.using("blokced"),
    ):
        pass
    with (
        kernels.using("blocked"),
        pytest.raises(InputError, match="backend blocked was asked for: blocked: 65 rows"),
    ):
        choose("grouped_matmul", problem(rows=65, experts=4), "cpu")


def test_no_unpacked_weight_is_held() -> None:
    """The blocked form on CPU: all its temporaries are smaller than the packed weight, an eighth of the float one."""
    packed = weight(Shape(1, (1024,), (8192,)), GRIDS["q4_0"])
    x = activation(Shape(1, (1024,), ()), "float32")

    def temporaries(backend: str) -> int:
        with kernels.using(backend):
            compiled = traced("matmul", equation="MR,RO->MO").lower(lhs=x, packed=packed).compile()
        return int(compiled.memory_analysis().temp_size_in_bytes)

    whole = 4 * 1024 * 8192
    assert temporaries("reference") >= whole  # what it would be: the test can fail
    assert temporaries("blocked") < whole / 8
