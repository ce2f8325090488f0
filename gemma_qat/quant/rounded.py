"""A weight that already lies on its grid.

A training step rounds every weight once, before microbatches are looped over and layers are rematerialized, and hands
the model `Rounded` leaves. What a leaf is decides what happens: a contraction takes these as they are.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from gemma_qat.numerics import QArray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rounded:
    """Values of a weight on its grid in the dtype of activations, and the codes where an integer dot multiplies them.

    Leading axes may be added in front of all arrays (a stack of layers) and sliced off again.
    """

    # Untyped on purpose: transforms rebuild pytrees around tracers, shapes and placeholders.
    value: Any
    codes: QArray | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.value.shape
