"""How fast packed contractions run: time, bytes a second, and beside a bfloat16 product of the same shape, in turn.

Every distinct matrix of a model's layers and its head is a shape. A measurement runs the product over several weights,
one after another inside one program, so that no weight is still in a cache when it is read again and starting a
program costs next to nothing. Packed and bfloat16 programs take turns in one process; figures are medians over rounds.
The yardstick is a copy of a large array on the same device, measured in the same process.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_qat import kernels
from gemma_qat.decode.roofline import copy_bandwidth
from gemma_qat.models import ModelConfig, declare
from gemma_qat.numerics import Grid, PackedArray
from gemma_qat.quant.sites import EXPERTS

Progress = Callable[[str, int, int], None]

GRIDS: dict[str, Grid] = {
    "q4_0": Grid(format="q4_0"),
    "int4_tile32": Grid(format="int4", tile=32),
    "int4": Grid(format="int4"),
    "int2": Grid(format="int2"),
    "int8": Grid(format="int8"),
}
"""What is measured, by name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Matrix:
    """A matrix of a model: what it is called, output and reduced elements, and how many experts share its name."""

    name: str
    outputs: int
    reduced: int
    experts: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speed:
    """One product. Units: seconds for one, bytes read for one, bytes a second."""

    matrix: str
    outputs: int
    reduced: int
    format: str
    rows: int
    backend: str
    why: str
    seconds: float
    bytes: int
    bandwidth: float
    share: float
    """Of the measured bandwidth of a copy."""
    bfloat16_seconds: float
    speedup: float
    """The time of the bfloat16 product over this one's."""


def matrices_of(config: ModelConfig) -> list[Matrix]:
    """Returns the distinct matrices of a model that a decode step multiplies with, largest first."""
    found: dict[tuple[int, int, int], Matrix] = {}
    for parameter in declare(config).values():
        if not parameter.is_site or parameter.role == "per_layer_embed":
            continue
        reduced = math.prod(parameter.shape[axis] for axis in parameter.reduced)
        lead = math.prod(parameter.shape[: parameter.reduced[0]])
        experts = lead if parameter.role in EXPERTS else 0
        outputs = parameter.size // reduced // max(experts, 1)
        key = (outputs, reduced, experts)
        name = "head" if parameter.role == "embed" else parameter.role
        found.setdefault(key, Matrix(name=name, outputs=outputs, reduced=reduced, experts=experts))
    return sorted(found.values(), key=lambda m: -m.outputs * m.reduced)


def bench_decode(
    config: ModelConfig,
    formats: Sequence[str],
    rows: Sequence[int],
    *,
    rounds: int = 7,
    megabytes: int = 256,
    progress: Progress | None = None,
) -> list[Speed]:
    """Returns the speed of every matrix in every format at every number of rows; what a format cannot be is left out.

    `megabytes` of packed weights are read in one measurement, whatever the shape.
    """
    say = progress or (lambda what, done, total: None)
    bandwidth = copy_bandwidth(megabytes)
    cases = [
        (matrix, name, count)
        for matrix in matrices_of(config)
        for name in formats
        for count in rows
        if matrix.reduced % (GRIDS[name].tile or 1) == 0
    ]
    out = []
    for number, (matrix, name, count) in enumerate(cases):
        say("measure", number, len(cases))
        out.append(_measure(matrix, name, count, rounds, megabytes, bandwidth))
    say("measure", len(cases), len(cases))
    return out


def _measure(
    matrix: Matrix, name: str, rows: int, rounds: int, megabytes: int, bandwidth: float
) -> Speed:
    grid = GRIDS[name]
    read = math.ceil(matrix.outputs * matrix.reduced * grid.bits_per_weight(matrix.reduced) / 8)
    copies = max(1, min(64, megabytes * 2**20 // max(2 * matrix.outputs * matrix.reduced, 1)))
    x = jax.random.normal(jax.random.key(0), (rows, matrix.reduced), jnp.bfloat16)
    packed = _random_packed(matrix, grid, copies)
    plain = jnp.zeros((copies, matrix.outputs, matrix.reduced), jnp.bfloat16)
    platform = jax.default_backend()
    platform = "cuda" if platform == "gpu" else platform
    choice = kernels.choose("matmul", kernels.problem_of(x, _one(packed)), platform)
    programs = {
        "packed": jax.jit(
            lambda x, w: _chain(x, w, lambda x, w: kernels.matmul("MR,OR->MO", x, w))
        ),
        "plain": jax.jit(lambda x, w: _chain(x, w, lambda x, w: jnp.einsum("MR,OR->MO", x, w))),
    }
    weights = {"packed": packed, "plain": plain}
    taken: dict[str, list[float]] = {kind: [] for kind in programs}
    for kind, run in programs.items():
        _once(run, x, weights[kind])  # compiles
    for _ in range(rounds):
        for kind, run in programs.items():
            taken[kind].append(_once(run, x, weights[kind]))
    seconds, other = (float(np.median(taken[kind])) / copies for kind in ("packed", "plain"))
    return Speed(
        matrix=matrix.name, outputs=matrix.outputs, reduced=matrix.reduced, format=name, rows=rows,
        backend=choice.backend.name, why=choice.why, seconds=seconds, bytes=read,
        bandwidth=read / seconds, share=read / seconds / bandwidth, bfloat16_seconds=other,
        speedup=other / seconds,
    )  # fmt: skip


def _random_packed(matrix: Matrix, grid: Grid, copies: int) -> PackedArray:
    bits = grid.number.bits
    key = jax.random.key(1)
    width = matrix.reduced * bits // 8
    words = jax.random.bits(key, (copies, matrix.outputs, width), jnp.uint8)
    scale = jnp.full((copies, matrix.outputs, grid.tiles(matrix.reduced)), 0.01, grid.scale_dtype)
    return PackedArray(
        words=words, scale=scale, grid=grid, shape=(matrix.outputs, matrix.reduced), reduced=(1,)
    )


def _one(packed: PackedArray) -> PackedArray:
    return dataclasses.replace(packed, words=packed.words[0], scale=packed.scale[0])


def _chain(x: jax.Array, weights: Any, product: Callable[[jax.Array, Any], jax.Array]) -> jax.Array:
    """Products with one weight after another, each waiting for the one before."""

    def body(x: jax.Array, weight: Any) -> tuple[jax.Array, None]:
        out = product(x, weight)
        return x + (jnp.max(out) * 0).astype(x.dtype), None

    return jax.lax.scan(body, x, weights)[0]


def _once(run: Any, x: jax.Array, weights: Any) -> float:
    start = time.perf_counter()
    run(x, weights).block_until_ready()
    return time.perf_counter() - start
