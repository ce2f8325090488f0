"""How post-training quantization that looks at text goes about it."""

from __future__ import annotations

import dataclasses
import math

from gemma_qat.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class PtqConfig:
    """Options of the methods; each reads those that concern it.

    `importance` weighs squared errors by the mean square of each weight's input. GPTQ: `damping` in means of the
    Hessian's diagonal is added to it, `act_order` takes inputs in falling order of their mean square.
    """

    importance: bool = False
    act_order: bool = True
    damping: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.damping < math.inf:
            raise InputError(f"ptq.damping={self.damping}: a finite number above 0 expected")
