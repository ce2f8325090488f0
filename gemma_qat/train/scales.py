"""Where scales start: those of weights beside each tile, static ones of activations by calibration."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp

from gemma_qat.errors import InputError
from gemma_qat.models import Fitted, Gemma4, RunOptions, uncalibrated
from gemma_qat.ptq import Batch, CalibrationConfig, calibrate, round_to_nearest
from gemma_qat.quant import scale_path
from gemma_qat.sharding import Placement


def with_scales(
    parameters: Mapping[str, Any],
    fitted: Fitted,
    init: str,
    batches: Iterable[Batch] | None = None,
    calibration: CalibrationConfig = CalibrationConfig(),
    options: RunOptions = RunOptions(),
    placement: Placement | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Returns the parameters with every scale leaf the plans ask for, float32.

    Weights' are found by `init`, a PTQ method (`mse`, `rtn`, `percentile`, `lsq`), static ones by calibration. Scales
    that `parameters` bring along are kept; static ones that are 0 are calibrated, unless they were imported as
    identity. With a placement the parameters lie on its mesh, and calibration runs there.
    Raises: InputError for an unknown method, or when static scales are to be calibrated and there are no `batches`.
    """
    out = fitted.adopt(parameters)
    sites = [path for path, plan in fitted.plans.items() if plan.has_scale_leaf]
    if any(scale_path(path) not in out for path in sites):
        start = round_to_nearest(out, fitted, init)
        out = {scale_path(p): start[p].scale.astype(jnp.float32) for p in sites} | out
    missing = uncalibrated(out, fitted.plans)
    if not missing or fitted.imported:
        return out
    if batches is None:
        raise InputError(
            f"recipe {fitted.recipe} rounds activations with static scales: give text to calibrate them on"
        )
    model = Gemma4.from_parameters(fitted.config, out, fitted.plans, options, placement)
    scales = calibrate(model, batches, calibration, progress).scales
    return out | {path: jnp.asarray(scales[path]) for path in missing}
