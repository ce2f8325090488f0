"""Everything static that one decoder layer needs to know about itself."""

from __future__ import annotations

import dataclasses

from gemma_qat.nn.rope import Rope
from gemma_qat.quant.sites import LayerKind


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsShape:
    """Number of experts, how many a token uses, and their width.

    `calls_all`: every expert sees every token, those not chosen with weight 0. The result is the same, the cost is not:
    it is for calibration, where an expert that few tokens choose would go without data.
    """

    count: int
    per_token: int
    width: int
    calls_all: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.per_token <= self.count or self.width < 1:
            raise ValueError(
                f"{self.per_token} of {self.count} experts a token, {self.width} wide: "
                "1 to all of them, at least 1 wide expected"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerShape:
    """The dimensions and conventions of one layer; equal layers have equal shapes."""

    kind: LayerKind
    width: int
    query_heads: int
    kv_heads: int
    head_width: int
    ffn_width: int
    window: int | None
    """Keys a token sees, itself included; None sees all before it."""
    rope: Rope
    eps: float
    key_equals_value: bool = False
    shares_kv: bool = False
    """Reads the keys and values of an earlier layer instead of making its own."""
    per_layer_width: int = 0
    experts: ExpertsShape | None = None

    @property
    def owns_value(self) -> bool:
        """Whether there is a value projection of its own."""
        return not self.shares_kv and not self.key_equals_value
