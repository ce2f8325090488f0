"""Experts over devices against the layer on one, whatever tokens choose. Run by `eight.py`."""

from __future__ import annotations

import functools
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from gemma_qat.nn import expert_parallel
from gemma_qat.nn.module import merge, split
from gemma_qat.nn.moe import Experts
from gemma_qat.nn.shapes import ExpertsShape
from gemma_qat.numerics import Grid, PackedArray, pack, quantize
from gemma_qat.quant.plan import Plan
from gemma_qat.sharding import MeshConfig, Placement, make_mesh

E, D, F, X, B, T = 8, 64, 32, 2, 8, 3
SHAPE = ExpertsShape(count=E, per_token=X, width=F)
PLAN = Plan(weight=Grid(format="q4_0"))
MESHES = {
    "exchange": MeshConfig(preset="fsdp+expert", data=2, expert=2),
    "exchange, all in eight": MeshConfig(preset="fsdp+expert", fsdp=1, expert=8),
    "select": MeshConfig(preset="fsdp+tensor", data=2, tensor=2),
    "gather": MeshConfig(preset="fsdp", data=2),
    "exchange, then select": MeshConfig(preset="decode", fsdp=1, expert=4, tensor=2),
}
CHOICES = ("spread", "all to one", "some empty")
CASES = [
    "exchange: spread", "exchange: all to one", "exchange: some empty",
    "exchange, then select: some empty", "exchange, all in eight: spread", "select: all to one",
    "gather: some empty", "ragged exchange: all to one", "ragged exchange: some empty",
    "packed exchange, then select: spread", "few rows exchange: some empty",
]  # fmt: skip


def chosen(name: str, rows: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    if name == "all to one":
        return np.tile(np.asarray([5, 2], np.int32), (rows * T, 1)).reshape(rows, T, X)
    among = np.arange(E) if name == "spread" else np.asarray([0, 3, 7])
    picks = [rng.permutation(among)[:X] for _ in range(rows * T)]
    return np.stack(picks).astype(np.int32).reshape(rows, T, X)


def experts() -> Experts:
    rng = np.random.default_rng(1)
    shapes = {"gate": (E, D, F), "up": (E, D, F), "down": (E, F, D)}
    leaves = {
        name: {"kernel": jnp.asarray(rng.standard_normal(shape) / 4, jnp.float32)}
        for name, shape in shapes.items()
    }
    return Experts(SHAPE, leaves, {f"{name}/kernel": PLAN for name in shapes})


def packed(module: Experts) -> Experts:
    def one(kernel: jax.Array) -> PackedArray:
        return pack(quantize(kernel, PLAN.weight, (1,)))

    leaves = {n: {"kernel": one(getattr(module, n).leaf)} for n in ("gate", "up", "down")}
    return Experts(SHAPE, leaves, {f"{name}/kernel": PLAN for name in leaves})


def through_ragged(
    operand: Any, output: Any, starts: Any, sizes: Any, at: Any, arriving: Any, *, axis_name: Any
) -> Any:
    """What `ragged_all_to_all` is defined to do, from an all-gather: this backend has none."""
    rows = jax.lax.all_gather(operand, axis_name)
    table = jax.lax.all_gather(
        jnp.stack([starts, sizes, at]), axis_name
    )  # [source, what, destination]
    here = jax.lax.axis_index(axis_name)
    slot = jnp.arange(output.shape[0])
    for source in range(rows.shape[0]):
        start, size, first = (table[source, what, here] for what in range(3))
        inside = (slot >= first) & (slot < first + size)
        index = jnp.clip(slot - first + start, 0, operand.shape[0] - 1)
        output = jnp.where(inside[:, None], jnp.take(rows[source], index, axis=0), output)
    del arriving
    return output


def close(got: Any, want: Any) -> float:
    """The largest difference over the largest value; float32 sums of at most 128 terms in another order."""
    return float(np.abs(np.asarray(got) - np.asarray(want)).max() / np.abs(np.asarray(want)).max())


@functools.cache
def step(where: Placement | None, is_packed: bool, rows: int, choice: str) -> tuple[Any, Any]:
    """Output, and gradients to the matrices (unless packed), the input and the weights."""
    rng = np.random.default_rng(2)
    y = jnp.asarray(rng.standard_normal((rows, T, D)), jnp.float32)
    weights = jnp.asarray(rng.uniform(0.2, 1.5, (rows, T, X)), jnp.float32)
    graph, state = split(packed(experts()) if is_packed else experts())
    ids = jnp.asarray(chosen(choice, rows))

    def score(state: Any, y: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = merge(graph, state)(y, ids, weights, None, where)
        return jnp.sum(jnp.sin(out)), out

    wrt = (1, 2) if is_packed else (0, 1, 2)
    (_, out), gradient = jax.jit(jax.value_and_grad(score, wrt, has_aux=True))(state, y, weights)
    return out, gradient


def case(name: str) -> dict[str, float]:
    """Values and gradients (input, weights, matrices) against one device; fails above the bound."""
    kind, _, choice = name.partition(": ")
    is_packed, few = kind.startswith("packed "), kind.startswith("few rows ")
    platforms = ("cpu",) if kind.startswith("ragged ") else expert_parallel.RAGGED
    for word in ("ragged ", "packed ", "few rows "):
        kind = kind.removeprefix(word)
    config = MESHES[kind]
    placement = Placement(make_mesh(config), config.preset)
    rows = 1 if few else B  # one row cuts nowhere: every device has it
    theirs, wanted = step(None, is_packed, rows, choice)
    with (
        mock.patch.object(expert_parallel, "RAGGED", platforms),
        mock.patch.object(jax.lax, "ragged_all_to_all", through_ragged),
    ):
        ours, gradient = step.__wrapped__(placement, is_packed, rows, choice)
    found = {"value": close(ours, theirs)}
    for path, got in jax.tree_util.tree_leaves_with_path(gradient):
        want = dict(jax.tree_util.tree_leaves_with_path(wanted))[path]
        found[jax.tree_util.keystr(path)] = close(got, want)
    # Two orders of 2 sqrt(n) u each, n = 48 rows or 64 columns, through three contractions and back (see test_step.py).
    bound = 2 * 2 * 6 * 8 * 2.0**-24
    assert max(found.values()) <= bound, (bound, found)
    return {"bound": bound, "largest": max(found.values())}
