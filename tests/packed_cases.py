"""What every backend of packed contractions is tried on: formats and shapes, odd ones among them."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_qat.numerics import Grid, PackedArray, pack, quantize

GRIDS = {
    "q4_0": Grid(format="q4_0"),
    "int4 tile 32": Grid(format="int4", tile=32),
    "int4": Grid(format="int4"),
    "q6_k": Grid(format="q6_k"),
    "int2": Grid(format="int2"),
    "int2 tile 32, bfloat16 scales": Grid(format="int2", tile=32, scale_dtype="bfloat16"),
    "int2_no_zero": Grid(format="int2_no_zero"),
    "ternary": Grid(format="ternary"),
    "int8": Grid(format="int8"),
    "q8_0": Grid(format="q8_0"),
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """Rows, reduced and output axes of a contraction; experts with the rows of each."""

    rows: int
    reduced: tuple[int, ...]
    outputs: tuple[int, ...]
    groups: tuple[int, ...] = ()

    @property
    def equation(self) -> str:
        """The einsum of rows with the weight."""
        reduced, outputs = "RS"[: len(self.reduced)], "OP"[: len(self.outputs)]
        return f"M{reduced},{reduced}{outputs}->M{outputs}"


SHAPES = {
    "one row": Shape(1, (64,), (40,)),
    "odd outputs": Shape(3, (96,), (2, 17)),
    "two reduced axes": Shape(5, (2, 48), (33,)),
    "more than a block": Shape(8, (256,), (300,)),
    "many rows": Shape(64, (32,), (24,)),
    "experts": Shape(6, (64,), (24,), (2, 0, 3, 1)),
    "experts with rows past the last": Shape(7, (32,), (17,), (0, 4, 1, 0)),
}


def spanning(*axes: dict[str, Any]) -> list[Any]:
    """Every combination of one value of each axis, for `parametrize`; all are slow but for so many as the longest
    axis has values, in which each value of each axis occurs."""
    kept = {tuple(t % len(axis) for axis in axes) for t in range(max(map(len, axes)))}
    cases = []
    for places in itertools.product(*(range(len(axis)) for axis in axes)):
        names = [list(axis)[at] for axis, at in zip(axes, places, strict=True)]
        values = [axis[name] for axis, name in zip(axes, names, strict=True)]
        marks = () if places in kept else (pytest.mark.slow,)
        cases.append(pytest.param(*values, id="-".join(names), marks=marks))
    return cases


def weight(shape: Shape, grid: Grid, seed: int = 0) -> PackedArray:
    """A packed random weight."""
    lead = (len(shape.groups),) if shape.groups else ()
    whole = (*lead, *shape.reduced, *shape.outputs)
    axes = tuple(range(len(lead), len(lead) + len(shape.reduced)))
    w = jnp.asarray(np.random.default_rng(seed).standard_normal(whole), jnp.float32)
    return pack(quantize(w, grid, axes))


def activation(shape: Shape, dtype: str, seed: int = 1) -> jax.Array:
    """Random rows; codes of int8."""
    rng = np.random.default_rng(seed)
    whole = (shape.rows, *shape.reduced)
    if dtype == "int8":
        return jnp.asarray(rng.integers(-128, 128, whole), jnp.int8)
    return jnp.asarray(rng.standard_normal(whole), dtype)


def exact(x: jax.Array, packed: PackedArray, shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """The product in float64 of the numbers the definition multiplies, and the sum of magnitudes it is made of."""
    values = np.asarray(packed.dequantize().astype(x.dtype), np.float64)
    rows = np.asarray(x, np.float64).reshape(shape.rows, -1)
    if not shape.groups:
        matrix = values.reshape(rows.shape[1], -1)
        return rows @ matrix, np.abs(rows) @ np.abs(matrix)
    expert = np.repeat(np.arange(len(shape.groups)), shape.groups)
    matrices = values.reshape(len(shape.groups), rows.shape[1], -1)[expert]
    some = rows[: len(expert)]
    product = np.einsum("cr,cro->co", some, matrices)
    return product, np.einsum("cr,cro->co", np.abs(some), np.abs(matrices))
