"""A Gemma 4 text decoder, as numbers."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from gemma_qat.nn.rope import Rope
from gemma_qat.nn.shapes import ExpertsShape, LayerShape
from gemma_qat.quant.sites import LayerKind

Family = Literal["e2b", "e4b", "dense", "moe"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything that defines a decoder; the names follow `numerics/dims.py`, not any one library's config file.

    Units: widths in elements, `window` in tokens (a token sees itself and window - 1 before it).
    """

    name: str
    layer_kinds: tuple[LayerKind, ...]
    vocab_size: int
    width: int
    query_heads: int
    kv_heads: int
    global_kv_heads: int
    head_width: int
    global_head_width: int
    ffn_width: int
    window: int
    shared_kv_layers: int = 0
    shared_ffn_width: int = 0
    """Feed-forward width of KV-sharing layers; 0 means the same as the others."""
    key_equals_value: bool = False
    """Whether global layers use their raw key projection as value."""
    per_layer_width: int = 0
    per_layer_vocab: int = 0
    experts: ExpertsShape | None = None
    local_rope: Rope = Rope(theta=10_000.0)
    global_rope: Rope = Rope(theta=1_000_000.0, fraction=0.25)
    logit_softcap: float | None = 30.0
    eps: float = 1e-6
    max_positions: int = 131_072
    ties_head: bool = True

    def __post_init__(self) -> None:
        for name in ("vocab_size", "width", "query_heads", "kv_heads", "global_kv_heads", "head_width",
                     "global_head_width", "ffn_width", "window", "max_positions"):  # fmt: skip
            if not 1 <= getattr(self, name) < 2**31:
                raise ValueError(
                    f"{self.name}: {name} is {getattr(self, name)}, at least 1 and below 2^31 expected"
                )
        for name in ("shared_ffn_width", "per_layer_width", "per_layer_vocab"):
            if not 0 <= getattr(self, name) < 2**31:
                raise ValueError(
                    f"{self.name}: {name} is {getattr(self, name)}, 0 or more and below 2^31 expected"
                )
        for name in ("eps", "logit_softcap"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise ValueError(
                    f"{self.name}: {name} is {getattr(self, name)}, finite and above 0 expected"
                )
        if self.query_heads % self.kv_heads or self.query_heads % self.global_kv_heads:
            raise ValueError(
                f"{self.name}: {self.query_heads} query heads cannot share "
                f"{self.kv_heads} local and {self.global_kv_heads} global key/value heads"
            )
        if not 0 <= self.shared_kv_layers < len(self.layer_kinds):
            raise ValueError(
                f"{self.name}: {self.shared_kv_layers} KV-sharing layers of {len(self.layer_kinds)}"
            )

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layer_kinds)

    @property
    def family(self) -> Family:
        """Which design it is; recipes are written for families."""
        if self.experts is not None:
            return "moe"
        if not self.per_layer_width:
            return "dense"
        double = self.shared_ffn_width not in (0, self.ffn_width)
        return "e2b" if double else "e4b"

    def layer_shape(self, index: int) -> LayerShape:
        """Returns the shape of layer `index`, counted from 0."""
        kind = self.layer_kinds[index]
        is_global = kind == "full"
        shares = index >= self.layers - self.shared_kv_layers
        return LayerShape(
            kind=kind,
            width=self.width,
            query_heads=self.query_heads,
            kv_heads=self.global_kv_heads if is_global else self.kv_heads,
            head_width=self.global_head_width if is_global else self.head_width,
            ffn_width=(self.shared_ffn_width or self.ffn_width) if shares else self.ffn_width,
            window=None if is_global else self.window,
            rope=self.global_rope if is_global else self.local_rope,
            eps=self.eps,
            key_equals_value=is_global and self.key_equals_value,
            shares_kv=shares,
            per_layer_width=self.per_layer_width,
            experts=self.experts,
        )

    def layer_shapes(self) -> tuple[LayerShape, ...]:
        """Returns the shapes of all layers."""
        return tuple(self.layer_shape(i) for i in range(self.layers))
