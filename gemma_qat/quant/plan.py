"""How one site is quantized.

A training matmul is three contractions (fwd, dlhs, drhs) of two operands each; a plan says how each operand is
quantized. What stands here is the rhs of the forward contraction, the weight: its grid and where its scales come from.
The backward contractions see the dequantized weight in full precision (straight-through gradient).

Source: the ontology of AQT v2 (google/aqt).
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from gemma_qat.numerics import Grid

ScaleMode = Literal["recomputed", "learned", "frozen"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How one site is quantized.

    `scales`: `recomputed` from the weights at every step, `learned` as parameters of their own (LSQ), or `frozen` at
    the values they were given.
    """

    weight: Grid
    scales: ScaleMode = "recomputed"

    @property
    def has_scale_leaf(self) -> bool:
        """Whether the scales are stored beside the weight rather than derived from it."""
        return self.scales != "recomputed"


Plans = dict[str, Plan]
"""Plan of each quantized parameter, by path; a parameter that is not there stays in float."""


def within(plans: Plans, prefix: str) -> Plans:
    """Returns the plans under `prefix/`, with paths relative to it."""
    start = f"{prefix}/"
    return {path[len(start) :]: plan for path, plan in plans.items() if path.startswith(start)}
