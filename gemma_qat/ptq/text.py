"""Whether a post-training quantization looks at text: what was given without a use is as wrong as what is missing."""

from __future__ import annotations

from gemma_qat.errors import InputError
from gemma_qat.models import Fitted, static_scale_paths
from gemma_qat.ptq.config import PtqConfig
from gemma_qat.ptq.methods import method_named


def check_text(fitted: Fitted, method: str, config: PtqConfig, *, given: bool) -> None:
    """Refuses text that nothing looks at, and its absence where something does.

    Raises: InputError for that, or for an unknown method.
    """
    looks = method_named(method).wants_text(config)
    static = bool(static_scale_paths(fitted.plans))
    if given and not looks and not static:
        raise InputError(
            f"recipe {fitted.recipe} has no static scales, and {method} without importance looks at no text: "
            "leave the calibration text out"
        )
    if static and not given:
        raise InputError(
            f"recipe {fitted.recipe} rounds activations with static scales: give text to calibrate them on"
        )
    if looks and not given:
        what = "importance" if config.importance else f"method {method}"
        raise InputError(f"{what} looks at text: give some to calibrate on")
