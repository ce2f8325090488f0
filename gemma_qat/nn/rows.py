"""A weight as torch and LiteRT keep one: a row of its reduced axes for every output.

    q kernel D N H  ->  rows [N * H, D]          table V D  ->  rows [V, D]

An exporter traces the model with such leaves: a contraction is then one product with a matrix that nobody turns, and
a look-up one that carries the name by which LiteRT's converter knows it.

Source of the name: `odml.embedding_lookup` in google-ai-edge/ai-edge-torch.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

LOOKUP = "odml.embedding_lookup"
"""What a look-up is called where a converter has to find it."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of a weight.

    Shapes: value [product of the outer axes, product of the reduced ones]; `out` are those of the outer axes of a
        matrix, in order. A table's rows are its only outer axis.
    """

    # Untyped on purpose: transforms rebuild pytrees around tracers, shapes and placeholders.
    value: Any
    out: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Outer axes, and the reduced ones as one."""
        return (*self.out, self.value.shape[-1])

    def contract(self, lhs: Float[Array, "..."], axes: int) -> Float[Array, "..."]:
        """Returns `lhs` times the weight: the weight's outer axes take the place of its last `axes` axes."""
        lead = lhs.shape[: lhs.ndim - axes]
        flat = lhs.reshape(*lead, math.prod(lhs.shape[lhs.ndim - axes :]))
        product = jnp.einsum("...i,oi->...o", flat, self.value, preferred_element_type=jnp.float32)
        return product.reshape(*lead, *self.out)

    def look_up(self, ids: Int[Array, "..."]) -> Float[Array, "... D"]:
        """Returns the rows `ids`, under the name `LOOKUP`."""
        take = jax.lax.composite(lambda ids, rows: jnp.take(rows, ids, axis=0, mode="clip"), LOOKUP)
        return take(ids.reshape(-1), self.value).reshape(*ids.shape, -1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tables:
    """The rows of a table [V, L, P] as L tables: what looks up has one scale a row, and here each layer has its own.

    Shapes: each [V, P].
    """

    each: tuple[Rows, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """[V, L, P]."""
        rows, width = self.each[0].value.shape
        return rows, len(self.each), width

    def look_up(self, ids: Int[Array, "..."]) -> Float[Array, "... L P"]:
        """Returns the rows `ids` of all, side by side."""
        return jnp.stack([table.look_up(ids) for table in self.each], axis=-2)
