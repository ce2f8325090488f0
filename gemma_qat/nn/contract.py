"""Every contraction with a weight, and every look-up in a weight table, happens here.

What the weight *is* decides what happens:

    float array, no plan        used as it is
    float array with a plan     fake-quantized on the plan's grid (scales recomputed, or the scale leaf beside it)
    Rounded                     used as it is: a training step rounded it before the layers ran
    PackedArray                 decoded by a kernel of `kernels/`
    Rows, Tables                as an exporter wants to see it in the program: [out, in]

and the plan says what becomes of the operands around it:

    lhs --round(input)--> einsum with the weight --round(output)--> result
                          `float`: a float dot of the rounded operands
                          `integer`: int8 codes, int32 sums: `quant/aqt.py`, or of packed weights a kernel, same bits
                          `packed`: the one or the other, by what the weight is

There is no train/serve switch. Sums of products accumulate in float32 or int32; the result has the activation's dtype.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gemma_qat import kernels
from gemma_qat.nn.dot import dot, rounded_dot
from gemma_qat.nn.integer_dot import packed_dot, packed_grouped_dot
from gemma_qat.nn.module import Leaves, Module, Param
from gemma_qat.nn.moments import grouped_moments_of, moments_of
from gemma_qat.nn.rows import Rows, Tables
from gemma_qat.nn.taps import Taps, record, tap, weigh
from gemma_qat.numerics import PackedArray, QArray
from gemma_qat.quant import aqt
from gemma_qat.quant.activations import round_dynamic, round_static, round_tiles
from gemma_qat.quant.fake import on_grid
from gemma_qat.quant.observe import summarize
from gemma_qat.quant.plan import Plan
from gemma_qat.quant.rounded import Rounded
from gemma_qat.quant.sites import scale_path

Leaf = jax.Array | PackedArray | Rounded | Rows | Tables


class Weight(Module):
    """A weight leaf, the plan for it, and the scale leaves the plan asks for.

    The leaf is an attribute of the module that owns it, so that its path reads `attn/q/kernel`; scales read
    `attn/q/kernel_scale`, `attn/q/kernel_input_scale`.
    """

    def __init__(
        self, name: str, leaves: Leaves, reduced: tuple[int, ...], plan: Plan | None
    ) -> None:
        self.name = name
        self.reduced = reduced
        self.plan = plan
        setattr(self, name, Param(leaves[name]))
        if plan is None:
            return
        if plan.has_scale_leaf and not isinstance(leaves[name], PackedArray | Rounded):
            setattr(self, scale_path(name), Param(leaves[scale_path(name)]))
        for suffix in plan.static_scales:
            setattr(self, f"{name}_{suffix}", Param(leaves[f"{name}_{suffix}"]))

    @property
    def leaf(self) -> Leaf:
        """The array (packed, rounded or plain) itself."""
        return getattr(self, self.name).get_value()

    @property
    def scale(self) -> jax.Array | None:
        """The scale leaf, if the plan has one."""
        variable = getattr(self, scale_path(self.name), None)
        return None if variable is None else variable.get_value()

    def effective(self, taps: Taps | None = None) -> tuple[jax.Array | PackedArray, QArray | None]:
        """Returns the weight a contraction sees (fake-quantized, plain, or packed) and its codes if it was rounded."""
        return _effective(self.leaf, self.scale, self.plan, self.reduced, self.name, taps)

    def rows(self, ids: Int[Array, "..."], taps: Taps | None = None) -> Float[Array, "..."]:
        """Returns the rows `ids` of a table [V, ...] whose last axis is the reduced one, float32.

        Only the rows asked for are quantized or decoded: scales never span rows.
        """
        leaf, scale = self.leaf, self.scale
        if isinstance(leaf, PackedArray):
            return kernels.rows(leaf, ids)
        if isinstance(leaf, Rounded):
            return jnp.take(leaf.value, ids, axis=0).astype(jnp.float32)
        if isinstance(leaf, Rows | Tables):
            return leaf.look_up(ids)
        picked = jnp.take(leaf, ids, axis=0)
        picked_scale = None if scale is None else jnp.take(scale, ids, axis=0)
        reduced = tuple(axis + ids.ndim - 1 for axis in self.reduced)
        weight, _ = _effective(picked, picked_scale, self.plan, reduced, f"{self.name}_rows", taps)
        assert isinstance(weight, jax.Array)
        return weight.astype(jnp.float32)

    def rounded(
        self, suffix: str, x: Float[Array, "..."], axes: int, taps: Taps | None = None
    ) -> Float[Array, "..."]:
        """Returns `x` rounded as the plan says for `suffix` (`input_scale`, `key_cache_scale`, ...).

        Dynamic scales span the last `axes` axes.
        """
        static = self.static(suffix, x, taps)
        if static is not None:
            return round_static(x, *static)
        how = None if self.plan is None else self.plan.activations.get(suffix)
        if how is None:
            return x
        last = tuple(range(x.ndim - axes, x.ndim))
        if how.per == "tile":
            return round_tiles(x, last)
        return round_dynamic(x, last, how.highest)[0]

    def static(
        self, suffix: str, x: Float[Array, "..."], taps: Taps | None = None
    ) -> tuple[jax.Array, int] | None:
        """Returns (scale, highest code) that `x` is rounded with, if the plan has a static scale for `suffix`.

        Statistics of `x` are recorded for whoever calibrates, and `x` itself for whoever looks inside. A scale that is
        not learned has no gradient.
        """
        how = None if self.plan is None else self.plan.activations.get(suffix)
        if how is None or not how.is_static:
            return None
        name = f"{self.name}_{suffix}"
        record(taps, name, lambda valid: summarize(x, valid))
        tap(taps, name, x)
        scale = getattr(self, name).get_value()
        return scale if how.learned else jax.lax.stop_gradient(scale), how.highest


def _effective(
    leaf: Leaf,
    scale: jax.Array | None,
    plan: Plan | None,
    reduced: tuple[int, ...],
    name: str,
    taps: Taps | None,
) -> tuple[jax.Array | PackedArray, QArray | None]:
    assert not isinstance(leaf, Rows | Tables), "what an exporter traces has no value"
    if isinstance(leaf, Rounded):
        return leaf.value, leaf.codes
    if plan is None or isinstance(leaf, PackedArray):
        return leaf, None
    value, q = on_grid(leaf, scale, plan, reduced)
    tap(taps, f"{name}/quantized", q)
    return value, q


def contract(
    equation: str, lhs: Float[Array, "..."], weight: Weight, taps: Taps | None = None
) -> Float[Array, "..."]:
    """Returns the einsum of an activation with a weight, in the activation's dtype.

    Shapes: as `equation` says, activation first (`'BTD,DNH->BTNH'`): the activation's last axes are contracted with the
    weight's reduced ones, the result is the activation's other axes, then the weight's.
    """
    axes = len(weight.reduced)
    free = lhs.ndim - axes
    plan, leaf = weight.plan, weight.leaf
    weigh(taps, f"{weight.name}/moments", lambda v, full: moments_of(lhs, axes, v, full=full))
    if _sums_codes(weight) and isinstance(leaf, PackedArray):
        assert plan is not None and plan.input is not None
        out = packed_dot(equation, lhs, leaf, plan.input, *_step(lhs, weight, taps))
    elif _sums_codes(weight) and plan is not None:
        out = aqt.integer_dot(*_operands(lhs, weight, taps), plan.backward)
    else:
        out = _float_dot(equation, lhs, weight, taps)
    return weight.rounded("output_scale", out, out.ndim - free, taps)


def _float_dot(equation: str, lhs: jax.Array, weight: Weight, taps: Taps | None) -> jax.Array:
    if isinstance(weight.leaf, Rows):
        return weight.leaf.contract(lhs, len(weight.reduced))
    rhs, _ = weight.effective(taps)
    static = weight.static("input_scale", lhs, taps)
    if static is None:
        lhs = weight.rounded("input_scale", lhs, len(weight.reduced))
    if isinstance(rhs, PackedArray):
        lhs = lhs if static is None else round_static(lhs, *static)
        return kernels.matmul(equation, lhs, rhs)
    rhs = rhs.astype(lhs.dtype)
    if static is not None:
        return rounded_dot(equation, lhs, rhs, *static).astype(lhs.dtype)
    return dot(equation, lhs, rhs).astype(lhs.dtype)


def contract_grouped(
    lhs: Float[Array, "C R"], weight: Weight, group_sizes: Int[Array, "E"], taps: Taps | None = None
) -> Float[Array, "C O"]:
    """Returns each row times the matrix of its expert.

    Shapes: lhs [C, R] sorted by expert; weight [E, R, O]; group_sizes [E] rows of each expert; rows past their sum
    belong to none and what becomes of them is not defined.
    """
    plan, leaf = weight.plan, weight.leaf
    rows, name = lhs, f"{weight.name}/moments"
    weigh(taps, name, lambda v, full: grouped_moments_of(rows, v, group_sizes, full=full))
    if _sums_codes(weight) and isinstance(leaf, PackedArray):
        assert plan is not None and plan.input is not None
        out = packed_grouped_dot(lhs, leaf, group_sizes, plan.input, *_step(lhs, weight, taps))
    elif _sums_codes(weight):
        out = aqt.integer_grouped_dot(*_operands(lhs, weight, taps), group_sizes)
    else:
        lhs = weight.rounded("input_scale", lhs, 1, taps)
        rhs, _ = weight.effective(taps)
        if isinstance(rhs, PackedArray):
            out = kernels.grouped_matmul(lhs, rhs, group_sizes)
        else:
            out = kernels.grouped_dot(lhs, rhs.astype(lhs.dtype), group_sizes).astype(lhs.dtype)
    return weight.rounded("output_scale", out, 1, taps)


def _sums_codes(weight: Weight) -> bool:
    """Whether int32 sums of codes are what is to be made."""
    arithmetic = "float" if weight.plan is None else weight.plan.arithmetic
    packed = isinstance(weight.leaf, PackedArray)
    return arithmetic == "integer" or (arithmetic == "packed" and packed)


def _step(lhs: jax.Array, weight: Weight, taps: Taps | None) -> tuple[jax.Array, ...]:
    """The static scale of an integer dot's activation, if that is what the plan says."""
    static = weight.static("input_scale", lhs, taps)
    return () if static is None else static[:1]


def _operands(
    lhs: jax.Array, weight: Weight, taps: Taps | None
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, QArray]:
    """Both operands of an integer dot: rounded values for the backward pass, codes and scales for the forward one."""
    assert weight.plan is not None and weight.plan.input is not None
    axes = tuple(range(lhs.ndim - len(weight.reduced), lhs.ndim))
    value, codes, scale = round_dynamic(lhs, axes, weight.plan.input.highest)
    rhs, q = weight.effective(taps)
    assert q is not None and isinstance(rhs, jax.Array)
    return value, codes, scale, rhs.astype(lhs.dtype), q
