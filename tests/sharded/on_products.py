"""Single packed products over devices (2 x data, 4 x tensor) against float64, and what their programs hold and move.

Run by `eight.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from twins import MESHES

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from packed_cases import Shape, activation, exact, weight

from gemma_qat import kernels
from gemma_qat.compiled import collectives, parse
from gemma_qat.kernels import Problem, blocked, operations
from gemma_qat.numerics import Grid, PackedArray, pack, quantize
from gemma_qat.sharding import Placement, cut_of, make_mesh, partition, sharding

SHAPES_CHECKED = False
PLACEMENT = Placement(make_mesh(MESHES["decode"]), "decode")
HEADS, SUMMED = Shape(8, (64,), (8, 17)), Shape(8, (4, 64), (33,))
PRODUCTS: dict[str, tuple[Shape, Grid, tuple[Any, ...]]] = {
    "outputs": (HEADS, Grid(format="q4_0"), ("tensor",)),
    "second output": (Shape(3, (64,), (3, 16)), Grid(format="int2"), (None, "tensor")),
    "reduced": (SUMMED, Grid(format="q4_0"), (None, "tensor")),
    "reduced and outputs": (Shape(2, (128,), (6,)), Grid(format="int4", tile=32), ("data", "tensor")),
    "reduced, off blocks": (Shape(2, (512,), (16,)), Grid(format="q6_k"), (None, "tensor")),
}  # fmt: skip
CASES = [
    *(f"{name}/{backend}" for name in (*PRODUCTS, "integers", "head", "rows of the head")
      for backend in ("blocked", "tpu", "gpu") if backend == "blocked" or "off blocks" not in name),
    "gradient", "compiled", "experts",
]  # fmt: skip
"""All there are; kernels refuse the format that is cut off its blocks."""


def placed(packed: PackedArray, axes: tuple[Any, ...]) -> PackedArray:
    """The weight with words and scales cut so, and told; one scale a row is not cut with the row."""
    where = partition(*axes)
    outputs = partition(*axes[: packed.words.ndim - 1])
    lies, scale = (sharding(PLACEMENT.mesh, one) for one in (where, outputs))
    return dataclasses.replace(
        packed, words=jax.device_put(packed.words, lies),
        scale=jax.device_put(packed.scale, lies if packed.grid.tile else scale),
        cut=cut_of(where, packed.words.ndim, PLACEMENT),
    )  # fmt: skip


def run(backend: str, operation: str, *arguments: Any, **settings: Any) -> tuple[Any, Problem]:
    """What an operation gives under jit, and the problem that a backend was chosen for."""
    seen: list[Problem] = []

    def choose(operation: str, problem: Problem, platform: str) -> kernels.Choice:
        seen.append(problem)
        return kernels.choose(operation, problem, platform)

    program = jax.jit(functools.partial(getattr(kernels, operation), **settings))
    with kernels.using(backend), mock.patch.object(operations, "choose", choose):
        return jax.device_get(program(*arguments)), seen[0]


def product(name: str, backend: str) -> dict[str, Any]:
    """How far a product is off, in parts of what float32 sums in any order may be, and what a device multiplied."""
    shape, grid, axes = PRODUCTS[name]
    packed, x = weight(shape, grid), activation(shape, "float32")
    want, size = exact(x, packed, shape)
    got, problem = run(
        backend, "matmul", lhs=x, packed=placed(packed, axes), equation=shape.equation
    )
    bound = np.prod(shape.reduced) * 2.0**-24 * size
    off = np.abs(got.astype(np.float64).reshape(want.shape) - want) / bound
    return {"off": float(off.max()), "seen": [problem.rows, problem.outputs, problem.reduced]}


def integers(backend: str) -> dict[str, Any]:
    """How many int32 sums differ."""
    packed, x = weight(HEADS, Grid(format="int4")), activation(HEADS, "int8")
    codes = np.asarray(packed.unpack().codes, np.int64).reshape(64, -1)
    want = np.asarray(x, np.int64) @ codes
    got, problem = run(
        backend, "integer_matmul", codes=x, packed=placed(packed, ("tensor",)), equation=HEADS.equation
    )  # fmt: skip
    differ = int(np.sum(got.reshape(want.shape) != want))
    return {"off": differ, "seen": [problem.rows, problem.outputs, problem.reduced]}


def head(backend: str, axes: tuple[Any, ...] = ("tensor",)) -> dict[str, Any]:
    """How many of the k largest are not those of one device: sums are exact, and rows of the table repeat."""
    rng = np.random.default_rng(3)
    table = np.tile(rng.integers(-7, 8, (20, 128)), (8, 1)).astype(np.float32)
    table[:, ::32] = -8  # of every tile: its scale is 1
    packed = pack(quantize(jnp.asarray(table), Grid(format="q4_0"), (1,)))
    hidden = jnp.asarray(rng.integers(-3, 4, (4, 2, 128)), jnp.float32)
    wanted = [(1, None), (50, None), (3, 30.0)] if backend == "blocked" else [(3, None)]
    off, seen = 0.0, None
    for k, cap in wanted:
        # What tanh gives may differ in its last place where it stands: then who is first does too.
        values, ids = jax.device_get(
            jax.jit(functools.partial(kernels.top, k=k, cap=cap))(hidden, packed)
        )
        (got, got_ids), problem = run(
            backend, "top", hidden=hidden, packed=placed(packed, axes), k=k, cap=cap
        )
        off += float(np.abs(got - values).max()) + (cap is None) * int(np.sum(ids != got_ids))
        seen = [problem.rows, problem.outputs, problem.reduced]
    return {"off": off, "seen": seen}


def gradient() -> dict[str, float]:
    """How far gradients of activation and scales over devices are from those of one, relative."""
    packed, x = weight(SUMMED, Grid(format="int8", tile=64)), activation(SUMMED, "float32")
    factors = jnp.asarray(np.random.default_rng(4).standard_normal((8, 33)), jnp.float32)

    def loss(x: jax.Array, scale: jax.Array, packed: PackedArray) -> jax.Array:
        own = dataclasses.replace(packed, scale=scale)
        return jnp.sum(factors * kernels.matmul(SUMMED.equation, x, own))

    there = placed(packed, (None, "tensor"))
    slope = jax.jit(jax.grad(loss, argnums=(0, 1), allow_int=True))
    with kernels.using("blocked"):
        both = [jax.device_get(slope(x, one.scale, one)) for one in (packed, there)]
    return {
        name: float(np.abs(a - b).max() / np.abs(a).max())
        for name, a, b in zip(("x", "scale"), *both, strict=True)
    }


def compiled() -> dict[str, Any]:
    """By product: what is moved, and the most elements of a float array against those of a device's part of the weight."""
    found: dict[str, Any] = {}
    for name, outputs, reduced, axes in (
        ("outputs", 256, 96, ("tensor",)), ("reduced", 64, 1024, (None, "tensor")),
        ("head", 256, 96, ("tensor",)),
    ):  # fmt: skip
        w = jnp.ones((outputs, reduced) if name == "head" else (reduced, outputs), jnp.float32)
        there = placed(pack(quantize(w, Grid(format="q4_0"), (1 if name == "head" else 0,))), axes)
        x = jax.device_put(jnp.ones((2, reduced)), sharding(PLACEMENT.mesh, partition("data")))
        call = functools.partial(kernels.matmul, "MR,RO->MO")
        if name == "head":
            call = functools.partial(kernels.top, k=2, cap=None)
        with mock.patch.object(blocked, "BLOCK_BYTES", 4 * 8 * reduced // 4):
            module = parse(
                jax.jit(lambda x, w, call=call: call(x, w)).lower(x, there).compile().as_text()
            )
        largest = max(
            int(np.prod(shape.dims)) for computation in module.computations.values()
            for one in computation.values() for shape in one.shapes if shape.dtype[0] in "bf"
        )  # fmt: skip
        moved = [[m.kind, " ".join(map(str, m.shapes))] for m in collectives(module)]
        found[name] = {"moved": moved, "largest": largest, "part": outputs * reduced // 4}
    return found


def experts() -> str:
    """Why experts that are cut and not moved to by `nn/expert_parallel.py` are multiplied by the definition."""
    shape = Shape(6, (64,), (24,), (2, 0, 3, 1))
    there = placed(weight(shape, Grid(format="q4_0")), ("tensor",))
    problem = kernels.problem_of(activation(shape, "float32"), there)
    return kernels.choose("grouped_matmul", problem, "cpu").why


ALONE = {"gradient": gradient, "compiled": compiled, "experts": experts}


def case(name: str) -> Any:
    """Figures of a case."""
    if name in ALONE:
        return ALONE[name]()
    kind, backend = name.split("/")
    if kind in PRODUCTS:
        return product(kind, backend)
    if kind == "integers":
        return integers(backend)
    return head(backend, ("tensor",) if kind == "head" else (None, "tensor"))
