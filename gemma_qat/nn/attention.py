"""Grouped-query attention of Gemma 4.

    q = rope(norm(h Wq))                       k = rope(norm(k^))      v = rms(v^)
    k^ = h Wk,  v^ = h Wv  or  v^ = k^ (the raw key projection) where key_equals_value
    scores = q . k  with scale 1 (the norms carry it); softmax in float32; no soft cap

A layer that shares keys and values has only Wq, its norm and Wo, and reads the source layer's k and v (after norm and
rotation). KV head m serves query heads m*G .. m*G + G-1.

Source: `Gemma4TextAttention` in huggingface/transformers; google-deepmind/gemma `gm/nn/gemma4`.
"""

from __future__ import annotations

import dataclasses

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from gemma_qat import kernels
from gemma_qat.kernels.reference import attention
from gemma_qat.nn.cache import KeyValues, Steps, visible
from gemma_qat.nn.contract import Weight, contract
from gemma_qat.nn.module import Leaves, Module
from gemma_qat.nn.norms import RMSNorm, rms
from gemma_qat.nn.rope import rotate
from gemma_qat.nn.shapes import LayerShape
from gemma_qat.nn.taps import Taps, listen, tap, under
from gemma_qat.numerics.cache_codes import Coded
from gemma_qat.quant.plan import Plan
from gemma_qat.sharding import Placement, constrain, partition

_HEADS = ("batch", None, "heads", None)
_KV_HEADS = ("batch", None, "kv_heads", None)
CACHES = ("key_cache_scale", "value_cache_scale")
"""What a plan calls the rounding of keys and of values."""


@dataclasses.dataclass(frozen=True)
class Context:
    """What every layer of one forward pass shares.

    Shapes: positions and segments int32 [B, T]; segment 0 is padding. `empty_cache`: nothing was written to the cache
    yet, so a prompt attends to itself alone. `padded`: there may be padding. `placement` says how activations lie on a
    mesh, if there is one.
    """

    positions: jax.Array
    segments: jax.Array
    empty_cache: bool = False
    padded: bool = True
    placement: Placement | None = None

    def cuts(self, rows: int) -> bool:
        """Returns whether so many rows lie on several devices."""
        return self.placement is not None and bool(self.placement.cut_over("batch", rows))


def attend(
    q_BTNH: Float[Array, "B T N H"],
    kv: KeyValues,
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    window: int | None,
    placement: Placement | None = None,
) -> Float[Array, "B T N H"]:
    """Returns the attention output of each query head.

    One token a row over a cache of codes is a kernel's, where the platform has one; it reads them where they lie.
    """
    B, T, N, H = q_BTNH.shape
    K = jax.tree.leaves(kv.keys)[0].shape[-2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    own = kv.own()
    mask_BTS = visible(positions, segments, own, window)
    if T == 1 and isinstance(kv.keys, Coded):
        out = _one_token(q_BTKGH[:, 0], kv, mask_BTS[:, 0], placement)
    else:
        out = attention(q_BTKGH, own.keys, own.values, mask_BTS).astype(q_BTNH.dtype)
    return out.reshape(B, T, N, H)


def _one_token(
    q_BKGH: Float[Array, "B K G H"],
    kv: KeyValues,
    visible_BS: Bool[Array, "B S"],
    placement: Placement | None,
) -> Float[Array, "B K G H"]:
    """Returns the attention of one token a row over codes; over a mesh of each device's own rows and heads."""
    given = (q_BKGH, kv.keys, kv.values, visible_BS, kv.layer)
    if placement is None:
        return kernels.attend(*given)
    B, K, G, _ = q_BKGH.shape
    rows, heads = placement.cut_over("batch", B), placement.cut_over("kv_heads", K)
    group = () if heads else placement.cut_over("heads", G)
    query = partition(rows, heads, group, ())
    lead = () if kv.layer is None else ((),)
    kept = (*lead, rows, (), heads)
    codes = jax.tree.map(lambda x: partition(*kept, *((),) * (x.ndim - len(kept))), kv.keys)
    here = (query, codes, codes, partition(rows, ()), partition())
    return placement.on_each_device(kernels.attend, here, query, checked=False)(*given)


class Attention(Module):
    """One layer's attention: projections, norms, rotation and the cache."""

    def __init__(self, shape: LayerShape, leaves: Leaves, plans: dict[str, Plan]) -> None:
        self.shape = shape
        self.q = Weight("kernel", leaves["q"], (0,), plans.get("q/kernel"))
        self.o = Weight("kernel", leaves["o"], (0, 1), plans.get("o/kernel"))
        self.q_norm = RMSNorm(leaves["q_norm"], shape.eps)
        if not shape.shares_kv:
            self.k = Weight("kernel", leaves["k"], (0,), plans.get("k/kernel"))
            self.k_norm = RMSNorm(leaves["k_norm"], shape.eps)
        if shape.owns_value:
            self.v = Weight("kernel", leaves["v"], (0,), plans.get("v/kernel"))

    def __call__(
        self,
        h: Float[Array, "B T D"],
        context: Context,
        source: KeyValues | None,
        cache: KeyValues | None,
        taps: Taps | None = None,
    ) -> tuple[Float[Array, "B T D"], KeyValues, KeyValues | None]:
        """Returns (output, the keys and values it looked at, its cache with this call's tokens written)."""
        shape = self.shape
        q = self.q_norm(self._project("BTD,DNH->BTNH", h, "q", taps))
        q = constrain(q, _HEADS, context.placement)
        q = rotate(q, context.positions, shape.rope)
        if shape.shares_kv:
            if source is None:
                raise ValueError(
                    "a KV-sharing layer was called without its source layer's keys and values"
                )
            kv = source
        else:
            kv, cache = _look_at(self._own(h, context, taps), cache, context, self._steps(cache))
        out = attend(q, kv, context.positions, context.segments, shape.window, context.placement)
        out = checkpoint_name(constrain(out, _HEADS, context.placement), "attn_out")
        out = self._project("BTNH,NHD->BTD", out, "o", taps)
        tap(taps, "out", out)
        return out, kv, cache

    def _own(self, h: Float[Array, "B T D"], context: Context, taps: Taps | None) -> KeyValues:
        # More devices than heads (E2B has one): heads that cannot be cut are on every device.
        raw = constrain(self._project("BTD,DKH->BTKH", h, "k", taps), _KV_HEADS, context.placement)
        value = raw
        if self.shape.owns_value:
            value = self._project("BTD,DKH->BTKH", h, "v", taps)
            value = constrain(value, _KV_HEADS, context.placement)
        key = rotate(self.k_norm(raw), context.positions, self.shape.rope)
        inner = listen(taps)
        # What is rounded is what a cache holds: keys after norm and rotation, values after their norm. Every reader
        # sees them so, prefill and KV-sharing layers included.
        key = self.k.rounded(CACHES[0], key, 1, inner)
        value = self.k.rounded(CACHES[1], rms(value, self.shape.eps), 1, inner)
        under(taps, "k", inner)
        return KeyValues(key, value, context.positions, context.segments)

    def _steps(self, cache: KeyValues | None) -> Steps:
        """The static scales of keys and values, if they have some and the cache has bits for all their codes."""
        if cache is None or not isinstance(cache.keys, Coded):
            return None, None
        plan = None if self.k.plan is None else self.k.plan.cache
        if plan is None or not plan.is_static or plan.bits > cache.keys.bits:
            return None, None
        key, value = (getattr(self.k, f"kernel_{name}").get_value() for name in CACHES)
        return key, value

    def _project(
        self, equation: str, x: Float[Array, "..."], name: str, taps: Taps | None
    ) -> Float[Array, "..."]:
        inner = listen(taps)
        out = contract(equation, x, getattr(self, name), inner)
        under(taps, name, inner)
        return out


def _look_at(
    fresh: KeyValues, cache: KeyValues | None, context: Context, steps: Steps
) -> tuple[KeyValues, KeyValues | None]:
    """Returns (what to attend to, the cache after writing)."""
    if cache is None:
        return fresh, None
    rows, tokens = fresh.positions.shape
    in_turn = tokens == 1 and not context.padded and not context.cuts(rows)
    written = cache.write(fresh, steps, in_turn=in_turn)
    if context.empty_cache:
        return fresh, written
    if tokens == 1 or not cache.WRAPS:
        return written, written
    # Several tokens at once may overwrite slots that the first of them still sees: look at old and new side by side.
    return cache.followed_by(fresh), written
