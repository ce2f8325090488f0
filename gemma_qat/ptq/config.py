"""How post-training quantization that looks at text goes about it."""

from __future__ import annotations

import dataclasses

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
        # Below, doubling would take forever to matter (and never, where float32 makes it 0); above, only it matters.
        if not 1e-9 <= self.damping <= 1e9:
            raise InputError(f"ptq.damping={self.damping}: a number from 1e-9 to 1e9 expected")
