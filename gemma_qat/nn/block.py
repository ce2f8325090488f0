"""One decoder layer.

    x = x + norm(attention(norm(x)))
    x = x + norm(feed-forward(x))            dense: mlp(norm(x));  MoE: norm(mlp(norm(x))) + norm(experts(norm(x)))
    x = x + norm(per-layer branch(x))        E2B, E4B
    x = x * layer scalar                     the whole residual stream

Source: `Gemma4TextDecoderLayer` in huggingface/transformers; google-deepmind/gemma `gm/nn/gemma4`.
"""

from __future__ import annotations

from jaxtyping import Array, Float

from gemma_qat.nn.attention import Attention, Context
from gemma_qat.nn.cache import KeyValues
from gemma_qat.nn.feedforward import FeedForward
from gemma_qat.nn.module import Leaves, Module, Param
from gemma_qat.nn.moe import Experts, Router
from gemma_qat.nn.norms import RMSNorm
from gemma_qat.nn.per_layer import PerLayerBranch
from gemma_qat.nn.shapes import LayerShape
from gemma_qat.nn.taps import Taps, leave, listen, under
from gemma_qat.quant.plan import Plans, within
from gemma_qat.sharding import constrain


class Block(Module):
    """One decoder layer; what it is made of follows from its `LayerShape`."""

    def __init__(self, shape: LayerShape, leaves: Leaves, plans: Plans) -> None:
        self.shape = shape
        self.attn = Attention(shape, leaves["attn"], within(plans, "attn"))
        self.ffn = FeedForward(leaves["ffn"], within(plans, "ffn"))
        self.pre_attn_norm = RMSNorm(leaves["pre_attn_norm"], shape.eps)
        self.post_attn_norm = RMSNorm(leaves["post_attn_norm"], shape.eps)
        self.pre_ffn_norm = RMSNorm(leaves["pre_ffn_norm"], shape.eps)
        self.post_ffn_norm = RMSNorm(leaves["post_ffn_norm"], shape.eps)
        if shape.per_layer_width:
            self.per_layer = PerLayerBranch(leaves["per_layer"], within(plans, "per_layer"))
            self.post_per_layer_norm = RMSNorm(leaves["post_per_layer_norm"], shape.eps)
        if shape.experts is not None:
            self.router = Router(
                shape.experts, shape.eps, leaves["router"], within(plans, "router")
            )
            self.experts = Experts(shape.experts, leaves["experts"], within(plans, "experts"))
            self.post_dense_norm = RMSNorm(leaves["post_dense_norm"], shape.eps)
            self.pre_experts_norm = RMSNorm(leaves["pre_experts_norm"], shape.eps)
            self.post_experts_norm = RMSNorm(leaves["post_experts_norm"], shape.eps)
        self.scalar = Param(leaves["scalar"])

    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: Context,
        per_layer: Float[Array, "B T P"] | None,
        source: KeyValues | None,
        cache: KeyValues | None,
        taps: Taps | None = None,
    ) -> tuple[Float[Array, "B T D"], KeyValues, KeyValues | None]:
        """Returns (residual, the keys and values its attention looked at, its cache after this call)."""
        attn = listen(taps)
        out, kv, cache = self.attn(self.pre_attn_norm(x), context, source, cache, attn)
        under(taps, "attn", attn)
        x = x + self.post_attn_norm(out)
        x = x + self.post_ffn_norm(self._feed_forward(x, context, taps))
        if per_layer is not None:
            inner = listen(taps)
            x = x + self.post_per_layer_norm(self.per_layer(x, per_layer, inner))
            under(taps, "per_layer", inner)
        x = x * self.scalar.get_value().astype(x.dtype)[None, None]
        x = constrain(x, ("batch", None, None), context.placement)
        leave(taps, "out", x)
        return x, kv, cache

    def _feed_forward(
        self, x: Float[Array, "B T D"], context: Context, taps: Taps | None
    ) -> Float[Array, "B T D"]:
        dense, router, experts = listen(taps), listen(taps), listen(taps)
        out = self.ffn(self.pre_ffn_norm(x), dense, context.placement)
        under(taps, "ffn", dense)
        if self.shape.experts is None:
            return out
        chosen, weights = self.router(x, router)
        z = self.pre_experts_norm(x)
        mixed = self.experts(z, chosen, weights, experts, context.placement)
        under(taps, "router", router)
        under(taps, "experts", experts)
        return self.post_dense_norm(out) + self.post_experts_norm(mixed)
