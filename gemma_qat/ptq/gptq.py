"""GPTQ: inputs are rounded one after the other, and those that are left make up for the error so far.

With H = E[x x^T] + damping (x the input of a weight W [R, O], a token) and Hinv = U^T U, U upper triangular, the loss
tr(d^T H d) of an error d is least, given that row i gets the error e_i, when the rows behind it move:

    for i in 0 .. R-1:    q_i = round(w_i)      e_i = (w_i - q_i) / U_ii      w_j -= U_ij e_i   for all j > i

`act_order` takes rows in falling order of H_ii: those whose errors cost most are rounded while most are left to make up
for them. Scales are found before, from the original weights (static groups), so that a row's scale is its tile's
whatever the order, and the file format knows nothing of it.

Rows are worked on in blocks: within one, row after row; what a block does to the rows behind it is one product. U comes
from one Cholesky decomposition and one triangular solve: with J the reversal, J H J = L L^T, and U = (J L J)^-1.

Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (arXiv
2210.17323), algorithm 1; act order and static groups as in IST-DASLab/gptq. There dead inputs (H_ii = 0) are set to
zero; here they are rounded to nearest, for other text may use them.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int8

from gemma_qat.numerics import Grid, QArray, refuse_nonfinite, rounding
from gemma_qat.numerics.tiles import split_axes
from gemma_qat.ptq.config import PtqConfig
from gemma_qat.ptq.layer import Reduced, Seen
from gemma_qat.ptq.rtn import ROUNDINGS

BLOCK = 128
"""Rows that are rounded before those behind them hear of it."""

_ELEMENTS = 2**26
"""Elements of weights and moments of experts that are worked on together."""


def gptq(
    w: jax.Array, grid: Grid, reduced: Reduced, seen: Seen | None, config: PtqConfig
) -> tuple[QArray, tuple[str, ...]]:
    """Returns (codes by GPTQ on scales of the least squared error, a line when the damping had to grow).

    Without moments (nothing is known of the input) this is rounding to nearest.
    Shapes: w [lead..., reduced..., trail...]; moments [R, R], or [E, R, R] for lead = E.
    Raises: InputError when moments are not finite.
    """
    importance = None if seen is None or not config.importance else seen.importance
    nearest = ROUNDINGS["mse"](w, grid, reduced, importance)
    if seen is None:
        return nearest, ()
    refuse_nonfinite(seen.moments, "moments of inputs")
    codes, damping = gptq_codes(
        w, seen.moments, nearest.scale, grid, reduced, config.damping, config.act_order
    )
    used = float(jnp.max(damping))
    notes: tuple[str, ...] = ()
    if used > config.damping * 1.5:
        count = int(jnp.sum(damping > config.damping * 1.5))
        notes = (
            f"damping raised to {used:g} for {count} of {damping.size} matrices of moments, which were not positive "
            "definite before",
        )
    return QArray(codes=codes, scale=nearest.scale, grid=grid, reduced=reduced), notes


@functools.partial(jax.jit, static_argnames=("grid", "reduced", "act_order", "block"))
def gptq_codes(
    w: Float[Array, "..."],
    moments: Float[Array, "..."],
    scale: Float[Array, "..."],
    grid: Grid,
    reduced: Reduced,
    damping: float | jax.Array,
    act_order: bool = True,
    block: int = BLOCK,
) -> tuple[Int8[Array, "..."], Float[Array, "E"]]:
    """Returns (codes of `w` on given, stored scales; the damping that was used, of each matrix of moments).

    Shapes: w [lead..., reduced..., trail...]; scale [lead..., Q, trail...]; moments [R, R] for all, or [E, R, R] with
    lead = E. Units: damping in means of the diagonal of moments; it is doubled until the Cholesky decomposition exists.
    Exactness: float32; codes are those of `numerics/rounding.py` for weights that have moved.
    """
    lead, R, trail = split_axes(w.shape, reduced)
    tiles, outputs = grid.tiles(R), math.prod(trail)
    groups = lead[0] if moments.ndim == 3 else 1

    def by_group(x: jax.Array, rows: int) -> jax.Array:
        """[lead..., rows, trail...] -> [G, rows, O]: where moments are shared, leading axes are outputs too."""
        x = x.astype(jnp.float32).reshape(math.prod(lead), rows, outputs)
        return x if moments.ndim == 3 else jnp.moveaxis(x, 0, 1).reshape(1, rows, -1)

    given = (by_group(w, R), moments.reshape(groups, R, R), by_group(scale, tiles))
    each = functools.partial(_one, grid=grid, damping=damping, act_order=act_order, block=block)
    together = max(1, min(groups, _ELEMENTS // (R * (R + given[0].shape[2]))))
    codes, used = jax.lax.map(lambda g: each(*g), given, batch_size=together)
    if moments.ndim == 2:
        codes = jnp.moveaxis(codes.reshape(R, math.prod(lead), outputs), 1, 0)
    return codes.reshape(w.shape), used


def _one(
    w: Float[Array, "R O"], moments: Float[Array, "R R"], scale: Float[Array, "Q O"], *,
    grid: Grid, damping: float | jax.Array, act_order: bool, block: int,
) -> tuple[Int8[Array, "R O"], Float[Array, ""]]:  # fmt: skip
    R = w.shape[0]
    diagonal = jnp.diagonal(moments)
    order = jnp.argsort(-diagonal, stable=True) if act_order else jnp.arange(R)
    upper, used = _factor(moments[order][:, order], damping)
    of_row = jnp.take(scale, order // (R // scale.shape[0]), axis=0)
    codes = _rounded(w[order], upper, of_row, grid, block)
    return jnp.zeros_like(codes).at[order].set(codes), used


def _factor(
    h: Float[Array, "R R"], damping: float | jax.Array
) -> tuple[Float[Array, "R R"], Float[Array, ""]]:
    """Returns (U, upper triangular, with U^T U the inverse of damped moments; the damping in means of the diagonal)."""
    R = h.shape[0]
    diagonal = jnp.diagonal(h)
    live = diagonal > 0
    mean = jnp.sum(diagonal) / jnp.maximum(jnp.sum(live), 1)
    mean = jnp.where(mean > 0, mean, 1.0)
    h = h + jnp.diag(jnp.where(live, 0.0, mean))
    one = jnp.eye(R, dtype=jnp.float32)

    def attempt(share: jax.Array) -> jax.Array:
        lower = jnp.linalg.cholesky((h + share * mean * one)[::-1, ::-1])
        return jax.scipy.linalg.solve_triangular(lower[::-1, ::-1], one, lower=False)

    def failed(found: tuple[jax.Array, jax.Array]) -> Bool[Array, ""]:
        return ~jnp.all(jnp.isfinite(found[1]))

    def again(found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return 2 * found[0], attempt(2 * found[0])

    first = jnp.asarray(damping, jnp.float32)
    used, upper = jax.lax.while_loop(failed, again, (first, attempt(first)))
    return upper, used


def _rounded(
    w: Float[Array, "R O"], upper: Float[Array, "R R"], scale: Float[Array, "R O"], grid: Grid, most: int
) -> Int8[Array, "R O"]:  # fmt: skip
    R, O = w.shape  # noqa: E741
    size = min(most, R)
    more = -R % size
    w, scale = (jnp.pad(x, ((0, more), (0, 0))) for x in (w, scale))
    upper = jnp.pad(upper, ((0, more), (0, more))) + jnp.diag(jnp.arange(R + more) >= R)
    columns = jnp.arange(R + more)

    def step(number: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        w, codes = state
        start = number * size
        rows = jax.lax.dynamic_slice(upper, (start, 0), (size, R + more))
        inside = jax.lax.dynamic_slice(rows, (0, start), (size, size))
        own, steps = (jax.lax.dynamic_slice(x, (start, 0), (size, O)) for x in (w, scale))

        def row(i: jax.Array, at: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            own, errors, found = at
            code = rounding.to_codes(own[i], steps[i], grid.number)
            error = (own[i] - rounding.from_codes(code, steps[i], grid.number)) / inside[i, i]
            moved = own - inside[i][:, None] * error[None, :]
            return moved, errors.at[i].set(error), found.at[i].set(code)

        empty = (jnp.zeros((size, O)), jnp.zeros((size, O), jnp.int8))
        _, errors, found = jax.lax.fori_loop(0, size, row, (own, *empty))
        # Rows in front are done, and U is 0 there; those of the block have heard of each other.
        behind = jnp.where((columns >= start + size)[None, :], rows, 0.0)
        w = w - jnp.einsum("MR,MO->RO", behind, errors, precision="highest")
        return w, jax.lax.dynamic_update_slice(codes, found, (start, 0))

    codes = jnp.zeros((R + more, O), jnp.int8)
    return jax.lax.fori_loop(0, (R + more) // size, step, (w, codes))[1][:R]
