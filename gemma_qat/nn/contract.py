"""Every contraction with a weight, and every look-up in a weight table, happens here.

What the weight *is* decides what happens:

    float array, no plan        used as it is
    float array with a plan     fake-quantized on the plan's grid (scales recomputed, or the scale leaf beside it)
    PackedArray                 decoded by a kernel of `kernels/`

There is no train/serve switch. Sums of products accumulate in float32; the result has the activation's dtype.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gemma_qat import kernels
from gemma_qat.nn.module import Leaves, Module, Param
from gemma_qat.nn.taps import Taps, tap
from gemma_qat.numerics import PackedArray
from gemma_qat.quant.fake import fake_quantize, fake_quantize_learned
from gemma_qat.quant.plan import Plan
from gemma_qat.quant.sites import scale_path


class Weight(Module):
    """A weight leaf, the plan for it, and the scale leaf the plan may ask for.

    The leaf is an attribute of the module that owns it, so that its path reads `attn/q/kernel`.
    """

    def __init__(
        self, name: str, leaves: Leaves, reduced: tuple[int, ...], plan: Plan | None
    ) -> None:
        self.name = name
        self.reduced = reduced
        self.plan = plan
        setattr(self, name, Param(leaves[name]))
        if plan is not None and plan.has_scale_leaf and not isinstance(leaves[name], PackedArray):
            setattr(self, scale_path(name), Param(leaves[scale_path(name)]))

    @property
    def leaf(self) -> jax.Array | PackedArray:
        """The array (or packed array) itself."""
        return getattr(self, self.name).get_value()

    @property
    def scale(self) -> jax.Array | None:
        """The scale leaf, if the plan has one."""
        variable = getattr(self, scale_path(self.name), None)
        return None if variable is None else variable.get_value()

    def effective(self, taps: Taps | None = None) -> jax.Array | PackedArray:
        """Returns the weight a contraction sees: fake-quantized, plain, or packed."""
        return _effective(self.leaf, self.scale, self.plan, self.reduced, self.name, taps)

    def rows(self, ids: Int[Array, "..."], taps: Taps | None = None) -> Float[Array, "..."]:
        """Returns the rows `ids` of a table, float32, as the grid gives them.

        Only the rows asked for are quantized or decoded: scales never span rows.
        """
        leaf, scale = self.leaf, self.scale
        if isinstance(leaf, PackedArray):
            return leaf.rows(ids).dequantize()
        picked = jnp.take(leaf, ids, axis=0)
        picked_scale = None if scale is None else jnp.take(scale, ids, axis=0)
        reduced = tuple(axis + ids.ndim - 1 for axis in self.reduced)
        weight = _effective(picked, picked_scale, self.plan, reduced, f"{self.name}_rows", taps)
        assert isinstance(weight, jax.Array)
        return weight.astype(jnp.float32)


def _effective(
    leaf: jax.Array | PackedArray,
    scale: jax.Array | None,
    plan: Plan | None,
    reduced: tuple[int, ...],
    name: str,
    taps: Taps | None,
) -> jax.Array | PackedArray:
    if plan is None or isinstance(leaf, PackedArray):
        return leaf
    if scale is None:
        value, q = fake_quantize(leaf, plan.weight, reduced)
    else:
        if plan.scales == "frozen":
            scale = jax.lax.stop_gradient(scale)
        value, q = fake_quantize_learned(leaf, scale, plan.weight, reduced)
    tap(taps, f"{name}/quantized", q)
    return value


def contract(
    equation: str, lhs: Float[Array, "..."], weight: Weight, taps: Taps | None = None
) -> Float[Array, "..."]:
    """Returns the einsum of an activation with a weight, in the activation's dtype.

    Shapes: as `equation` says, activation first (`'BTD,DNH->BTNH'`).
    """
    rhs = weight.effective(taps)
    if isinstance(rhs, PackedArray):
        return kernels.matmul(equation, lhs, rhs)
    out = jnp.einsum(equation, lhs, rhs.astype(lhs.dtype), preferred_element_type=jnp.float32)
    return out.astype(lhs.dtype)


def contract_grouped(
    lhs: Float[Array, "C R"], weight: Weight, group_sizes: Int[Array, "E"], taps: Taps | None = None
) -> Float[Array, "C O"]:
    """Returns each row times the matrix of its expert.

    Shapes: lhs [C, R] sorted by expert; weight [E, R, O]; group_sizes [E] rows of each expert, adding up to C.
    """
    rhs = weight.effective(taps)
    if isinstance(rhs, PackedArray):
        return kernels.grouped_matmul(lhs, rhs, group_sizes)
    out = jax.lax.ragged_dot(
        lhs, rhs.astype(lhs.dtype), group_sizes, preferred_element_type=jnp.float32
    )
    return out.astype(lhs.dtype)
