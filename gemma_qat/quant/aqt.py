"""Integer dots by AQT: our codes in, int32 sums, AQT's own quantized contractions on the way back.

    fwd     y    = (codes_x . codes_w as int32) * s_x * s_w          our codes and scales, handed over as QTensors
    dlhs    dx   = g . w_hat^T     float, or int8 x int8 on AQT's quantizers
    drhs    dw   = g^T . x_hat     float, or int8 x int8 on AQT's quantizers

AQT (google/aqt, package `aqtp`) would quantize the forward operands itself. It is given finished codes instead, so that
training, PTQ, packing and serving share one definition of a code (`numerics/`), and a packed model that calls the same
function on stored codes gives the training forward's bits: the int32 sum is exact, and two float32 products follow it.
Half-precision activations are widened for the two products and narrowed once at the end.

Gradients pass straight to the operands: the caller hands over rounded values, and where codes saturate is decided where
they are made. With `Backward`, gradients are rounded stochastically, which keeps them unbiased. The noise needs no key
from outside: it is drawn from a key made of a checksum of the operand, different in every step because activations are,
and the same again when a run is resumed.

Experts: AQT's ragged dot shares one scale among experts and has no backward pass, so the grouped form is ours, integer
forward and straight through backward.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from aqt.jax.v2 import aqt_tensor, config
from jaxtyping import Array, Float, Int, Int8

from gemma_qat.kernels import grouped_dot
from gemma_qat.numerics import QArray
from gemma_qat.quant.plan import Backward


def integer_dot(
    lhs: Float[Array, "..."],
    lhs_codes: Int8[Array, "..."],
    lhs_scale: Float[Array, "..."],
    rhs: Float[Array, "..."],
    rhs_codes: QArray,
    backward: Backward | None = None,
) -> Float[Array, "..."]:
    """Returns the activation's last axes contracted with the weight's reduced ones, in the activation's dtype.

    Shapes: lhs, its codes and its scale of equal rank, the scale of size 1 along contracted axes; rhs as its codes, one
        scale per output channel; result: the other axes of lhs, then those of rhs.
    Exactness: int32 sum times lhs scale times rhs scale, two float32 roundings; packed or not, the same bits.
    """
    reduced = rhs_codes.reduced
    contracted = tuple(range(lhs.ndim - len(reduced), lhs.ndim))
    ones = (1,) * len(reduced)
    first, last = reduced[0], reduced[0] + 1
    shape = (*rhs_codes.scale.shape[:first], *ones, *rhs_codes.scale.shape[last:])
    scale = rhs_codes.scale.astype(jnp.float32).reshape(shape)
    wide = lhs.astype(jnp.float32)
    dot = _configured(backward, wide, rhs_codes.codes)
    out, _ = dot.dg_core(
        wide,
        rhs.astype(jnp.float32),
        _tensor(lhs_codes, lhs_scale),
        _tensor(rhs_codes.codes, scale),
        ((contracted, reduced), ((), ())),
    )
    return out.astype(lhs.dtype)


def _tensor(codes: jax.Array, scale: jax.Array) -> Any:
    return aqt_tensor.QTensor(
        qvalue=codes, scale=[scale], scale_t=None, bias=[], dequant_dtype=jnp.dtype("float32")
    )


def _configured(backward: Backward | None, operand: jax.Array, codes: jax.Array) -> Any:
    """AQT's config: nothing of its own forward, `backward` on the way back."""
    dlhs = None if backward is None else backward.dlhs_bits
    drhs = None if backward is None else backward.drhs_bits
    dot = config.config_v4(fwd_bits=None, dlhs_bits=dlhs, drhs_bits=drhs)
    dot.fwd.allow_dummy_gradient_into_qtensor = True
    dot.fwd.dg_accumulator_dtype = np.dtype("int32")
    stochastic = backward is not None and backward.stochastic
    config.set_stochastic_rounding(
        dot,
        vjp_lhs_stochastic_rounding=stochastic,
        vjp_rhs_stochastic_rounding=False,
        implementation="jax.uniform",
    )
    key = _key_of(operand, codes) if stochastic else None
    return config.set_context(dot, key, None)


def _key_of(operand: jax.Array, codes: jax.Array) -> jax.Array:
    """A key made of the sums of both operands: another one, other noise, also where sites share their input."""
    total = jnp.sum(jax.lax.stop_gradient(operand))
    key = jax.random.key(jax.lax.bitcast_convert_type(total, jnp.uint32))
    return jax.random.fold_in(key, jnp.sum(codes, dtype=jnp.int32).astype(jnp.uint32))


@jax.custom_vjp
def integer_grouped_dot(
    lhs: Float[Array, "C R"],
    lhs_codes: Int8[Array, "C R"],
    lhs_scale: Float[Array, "#C 1"],
    rhs: Float[Array, "E R O"],
    rhs_codes: QArray,
    group_sizes: Int[Array, "E"],
) -> Float[Array, "C O"]:
    """Returns each row times the matrix of its expert, by integer dots.

    Shapes: rows sorted by expert, `group_sizes` [E] adding up to C; one scale per expert and output channel.
    Exactness: as `integer_dot` of each expert alone, bit for bit.
    """
    sums = jax.lax.ragged_dot(
        lhs_codes, rhs_codes.codes, group_sizes, preferred_element_type=jnp.int32
    )
    scale = jnp.repeat(
        rhs_codes.scale.astype(jnp.float32)[:, 0], group_sizes, axis=0, total_repeat_length=len(lhs)
    )
    return (sums.astype(jnp.float32) * lhs_scale * scale).astype(lhs.dtype)


def _grouped_forward(lhs, lhs_codes, lhs_scale, rhs, rhs_codes, group_sizes):
    out = integer_grouped_dot(lhs, lhs_codes, lhs_scale, rhs, rhs_codes, group_sizes)
    return out, (lhs, rhs, group_sizes)


def _grouped_backward(residuals, g: jax.Array):
    lhs, rhs, group_sizes = residuals

    out, back = jax.vjp(lambda lhs, rhs: grouped_dot(lhs, rhs, group_sizes), lhs, rhs)
    d_lhs, d_rhs = back(g.astype(out.dtype))
    return d_lhs, None, None, d_rhs, None, None


integer_grouped_dot.defvjp(_grouped_forward, _grouped_backward)
