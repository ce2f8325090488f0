"""Post-training quantization of a whole model: codes by a method, static scales by calibration."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from gemma_qat.errors import InputError
from gemma_qat.models import (
    Fitted,
    RunOptions,
    float_parameters,
    packed_model,
    static_scale_paths,
)
from gemma_qat.numerics import QArray
from gemma_qat.ptq.calibrate import Batch, Calibrated, CalibrationConfig, calibrate
from gemma_qat.ptq.rtn import round_to_nearest


def quantize_model(
    parameters: Mapping[str, Any],
    fitted: Fitted,
    method: str = "rtn",
    batches: Iterable[Batch] | None = None,
    calibration: CalibrationConfig = CalibrationConfig(),
    options: RunOptions = RunOptions(),
    progress: Callable[[str, int, int], None] | None = None,
    heard: Callable[[Calibrated], None] | None = None,
) -> tuple[dict[str, QArray], dict[str, Any]]:
    """Returns (codes and scales by site, what stays in float with its static scales calibrated).

    `heard` is told what calibration found.

    Raises: InputError for an unknown method, or when the recipe has static scales and there are no `batches` to
        calibrate them on.
    """
    is_static = bool(static_scale_paths(fitted.plans))
    if is_static and batches is None:
        raise InputError(
            f"recipe {fitted.recipe} rounds activations with static scales: give text to calibrate them on"
        )
    start = fitted.adopt(parameters)
    codes = round_to_nearest(start, fitted, method, progress)
    floats = float_parameters(start, fitted)
    if not is_static or batches is None:
        return codes, floats
    model = packed_model(codes, floats, fitted, options)
    found = calibrate(model, batches, calibration, progress)
    if heard:
        heard(found)
    return codes, floats | found.scales
