"""What a recipe sees of a model: its parameters as data.

A model declares every stored array once, as a `Parameter`. Those that enter a contraction or a table look-up
carry their equation and reduced axes: they are the *sites* a recipe gives plans to. The others (norms,
scalars) are declared too,
so that coverage has a row for everything and nothing can be skipped by silence.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

Role = Literal[
    "embed", "head", "per_layer_embed", "per_layer_model_projection", "per_layer_gate", "per_layer_projection",
    "attn_q", "attn_k", "attn_v", "attn_o", "ffn_gate", "ffn_up", "ffn_down",
    "expert_gate", "expert_up", "expert_down", "router", "norm", "scalar",
]  # fmt: skip

EXPERTS: frozenset[Role] = frozenset({"expert_gate", "expert_up", "expert_down"})
"""Roles of the matrices of experts, which are stacked along a leading axis."""

LayerKind = Literal["sliding", "full"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parameter:
    """One stored array of a model.

    Shapes: `shape` lists reduced axes first and output axes after them, a batch axis (experts, table rows) leading.
    """

    path: str
    """Such as `layers/17/attn/q/kernel`; part of the checkpoint format."""
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    """Logical axis names, one per dimension; `sharding/` maps them to a mesh."""
    role: Role
    equation: str | None = None
    """Einsum of the site, activation first; None where there is no contraction."""
    reduced: tuple[int, ...] = ()
    init: Literal["normal", "constant"] = "constant"
    init_scale: float = 1.0
    """Standard deviation of a normal start, or the constant."""
    layer: int | None = None
    layer_kind: LayerKind | None = None
    shares_kv: bool = False

    @property
    def is_site(self) -> bool:
        """Whether a recipe may quantize it."""
        return bool(self.reduced)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def scale_path(self) -> str:
        """Path of the learned scales that stand beside it."""
        return scale_path(self.path)


SCALE_NAMES = ("scale", "input_scale", "output_scale", "key_cache_scale", "value_cache_scale")
"""What scale leaves beside an array are called, after its own name and an underscore."""


def scale_path(path: str, name: str = "scale") -> str:
    """Returns the path of the scales of the array at `path`: its last name with `_scale` (or `_<name>`) added."""
    return f"{path}_{name}"
