"""What the layers call: a packed contraction by whichever backend takes it on the platform it is lowered for."""

from __future__ import annotations

import math
from typing import Any

import jax
from jaxtyping import Array, Float, Int, Int8, Int32

from gemma_qat.kernels import reference
from gemma_qat.kernels.problem import Problem, problem_of
from gemma_qat.kernels.table import PLATFORMS, choose
from gemma_qat.numerics import PackedArray
from gemma_qat.numerics.tiles import split_axes


def matmul(lhs: Float[Array, "..."], packed: PackedArray) -> Float[Array, "..."]:
    """Returns an activation's last axes contracted with a packed weight's reduced ones, in the activation's dtype.

    Shapes: the activation's other axes, then the weight's.
    Exactness: the products are the definition's, the sum is float32 in another order.
    """
    x, shape = _rows(lhs, packed)
    out = _run("matmul", problem_of(x, packed), x, packed)
    return out.astype(lhs.dtype).reshape(shape)


def integer_matmul(codes: Int8[Array, "..."], packed: PackedArray) -> Int32[Array, "..."]:
    """Returns the int32 sums of products of codes, shaped as `matmul`; exact."""
    x, shape = _rows(codes, packed)
    return _run("integer_matmul", problem_of(x, packed), x, packed).reshape(shape)


def grouped_matmul(
    lhs: Float[Array, "C R"], packed: PackedArray, group_sizes: Int[Array, "E"]
) -> Float[Array, "C O"]:
    """Returns each row times the packed matrix of its expert, in the rows' dtype; rows sorted by expert.

    What becomes of rows past the sum of `group_sizes` is not defined.
    """
    out = _run("grouped_matmul", problem_of(lhs, packed), lhs, packed, group_sizes)
    return out.astype(lhs.dtype)


def top(
    hidden: Float[Array, "... D"], packed: PackedArray, k: int, cap: float | None
) -> tuple[Float[Array, "... k"], Int[Array, "... k"]]:
    """Returns the k largest soft-capped logits of a packed head [V, D] and their ids, the largest first.

    Of equal logits the lower id comes first.
    """
    x, _ = _rows(hidden, packed)
    values, ids = _run("top", problem_of(x, packed), x, packed, k=k, cap=cap)
    lead = hidden.shape[:-1]
    return values.reshape(*lead, k), ids.reshape(*lead, k)


def rows(packed: PackedArray, ids: Int[Array, "..."]) -> Float[Array, "..."]:
    """Returns rows of a packed table, float32: a gather of words, which XLA does as well as a kernel would."""
    return reference.rows(packed, ids)


def _rows(lhs: jax.Array, packed: PackedArray) -> tuple[jax.Array, tuple[int, ...]]:
    """An activation as [M, R], and the shape of what it gives."""
    lead, reduced, trail = split_axes(packed.shape, packed.reduced)
    outputs = trail or lead
    free = lhs.ndim - len(packed.reduced)
    shape = (*lhs.shape[:free], *outputs)
    return lhs.reshape(math.prod(lhs.shape[:free]), reduced), shape


def _run(operation: str, problem: Problem, *arguments: Any, **settings: Any) -> Any:
    """Runs the backend of each platform that differs, chosen where the program is lowered."""
    chosen = {name: choose(operation, problem, name).backend for name in PLATFORMS}
    default = chosen["cpu"]
    others = {
        name: _bound(backend.operations[operation], settings)
        for name, backend in chosen.items()
        if backend.name != default.name
    }
    run = _bound(default.operations[operation], settings)
    if not others:
        return run(*arguments)
    return jax.lax.platform_dependent(*arguments, **others, default=run)


def _bound(function: Any, settings: dict[str, Any]) -> Any:
    return lambda *arguments: function(*arguments, **settings)


__all__ = ["grouped_matmul", "integer_matmul", "matmul", "rows", "top"]
