"""What the layers call: packed contractions and attention over codes.

Each is run by whichever backend takes it on the platform it is lowered for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Bool, Float, Int, Int8, Int32

from gemma_qat.kernels import reference
from gemma_qat.kernels.cached import Cached, cached_of
from gemma_qat.kernels.devices import OVER
from gemma_qat.kernels.gradient import with_gradient_of
from gemma_qat.kernels.problem import Problem, problem_of
from gemma_qat.kernels.table import PLATFORMS, Choice, choose
from gemma_qat.numerics import PackedArray
from gemma_qat.numerics.cache_codes import Coded


def matmul(equation: str, lhs: Float[Array, "..."], packed: PackedArray) -> Float[Array, "..."]:
    """Returns the einsum of an activation with a packed weight, in the activation's dtype.

    Shapes: as `equation` says: the activation's last axes are contracted with the weight's reduced ones, the result is
    the activation's other axes, then the weight's.
    Exactness: the products are the definition's, the sum is float32 in another order.
    """
    out = _run("matmul", lhs, packed, equation=equation)
    return out.astype(lhs.dtype)


def integer_matmul(
    equation: str, codes: Int8[Array, "..."], packed: PackedArray
) -> Int32[Array, "..."]:
    """Returns the int32 sums of products of codes, shaped as `matmul`; exact."""
    return _run("integer_matmul", codes, packed, equation=equation)


def grouped_matmul(
    lhs: Float[Array, "C R"], packed: PackedArray, group_sizes: Int[Array, "E"]
) -> Float[Array, "C O"]:
    """Returns each row times the packed matrix of its expert, in the rows' dtype; rows sorted by expert.

    What becomes of rows past the sum of `group_sizes` is not defined.
    """
    out = _run("grouped_matmul", lhs, packed, group_sizes)
    return out.astype(lhs.dtype)


def integer_grouped_matmul(
    codes: Int8[Array, "C R"], packed: PackedArray, group_sizes: Int[Array, "E"]
) -> Int32[Array, "C O"]:
    """Returns the int32 sums of products of each row's codes with those of its expert; exact, rows as above."""
    return _run("integer_grouped_matmul", codes, packed, group_sizes)


def top(
    hidden: Float[Array, "... D"], packed: PackedArray, k: int, cap: float | None
) -> tuple[Float[Array, "... k"], Int[Array, "... k"]]:
    """Returns the k largest soft-capped logits of a packed head [V, D] and their ids, the largest first.

    Of equal logits the lower id comes first.
    """
    if packed.cut is not None and packed.cut.axes[-1]:
        # Parts of a logit have no order: they are added up first.
        logits = _run("matmul", hidden, packed, equation="...D,VD->...V")
        values, ids = jax.lax.top_k(reference.capped(logits, cap), k)
        return values, ids
    return _run("top", hidden, packed, k=k, cap=cap)


def rows(packed: PackedArray, ids: Int[Array, "..."]) -> Float[Array, "..."]:
    """Returns rows of a packed table, float32: a gather of words, which XLA does as well as a kernel would."""
    return reference.rows(packed, ids)


def attend(
    q: Float[Array, "B K G H"],
    keys: Coded,
    values: Coded,
    visible: Bool[Array, "B S"],
    layer: Any = None,
) -> Float[Array, "B K G H"]:
    """Returns the attention output of one token a row over a cache of codes, in the queries' dtype.

    Keys and values of several layers, [L, B, S, K, ...], are read where they lie: those of `layer`, int32, a scalar.
    Query heads are grouped by the head of keys and values that they read. Something finite for a row that sees nothing.
    Exactness: the definition's numbers are multiplied; softmax and sums are float32, in another order.
    """
    return _chosen("attend", q, keys, values, visible, layer).astype(q.dtype)


_DIFFERENTIABLE = ("matmul", "grouped_matmul")
"""Operations with a gradient: a program that is differentiated traces the kernels of every platform."""


def _run(operation: str, *arguments: Any, **settings: Any) -> Any:
    """Runs an operation on (activation, packed weight, ...), by every device on its own words where they are cut."""
    run: Any = functools.partial(_chosen, operation)
    if arguments[1].cut is not None and operation in OVER:
        run = functools.partial(OVER[operation], run)
    run = functools.partial(run, **settings)
    if operation in _DIFFERENTIABLE:
        run = with_gradient_of(_bound(getattr(reference, operation), settings), run)
    return run(*arguments)


def _chosen(operation: str, *arguments: Any, **settings: Any) -> Any:
    """Runs the backend of each platform that differs, chosen where the program is lowered."""
    problem = _problem(*arguments)
    chosen = tuple((name, choose(operation, problem, name)) for name in PLATFORMS)
    return _program(operation, chosen, tuple(sorted(settings.items())))(*arguments)


@functools.cache
def _program(
    operation: str, chosen: tuple[tuple[str, Choice], ...], settings: tuple[tuple[str, Any], ...]
) -> Callable[..., Any]:
    """Returns the operation by the backend of the platform it is lowered for.

    As one function for all sites of one shape, so that jax traces the kernels of every platform once for them.
    """
    given, by_platform = dict(settings), dict(chosen)
    default = by_platform["cpu"]
    others = {
        name: _bound(choice.run(operation), given)
        for name, choice in chosen
        if (choice.backend.name, choice.interpret) != (default.backend.name, default.interpret)
    }
    run = _bound(default.run(operation), given)
    if others:
        run = functools.partial(jax.lax.platform_dependent, default=run, **others)
    return jax.jit(run)


def _problem(lhs: jax.Array, rhs: PackedArray | Coded, *others: Any) -> Problem | Cached:
    return cached_of(lhs, rhs) if isinstance(rhs, Coded) else problem_of(lhs, rhs)


def _bound(function: Any, settings: dict[str, Any]) -> Any:
    if "equation" in settings:
        return functools.partial(function, settings["equation"])
    return functools.partial(function, **settings)


__all__ = [
    "attend",
    "grouped_matmul",
    "integer_grouped_matmul",
    "integer_matmul",
    "matmul",
    "rows",
    "top",
]
