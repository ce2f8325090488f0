"""Where scales start: those of weights beside each tile, static ones of activations by calibration."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_qat.errors import InputError
from gemma_qat.models import Fitted, Gemma4, RunOptions, declare, uncalibrated
from gemma_qat.ptq import Batch, CalibrationConfig, calibrate, round_to_nearest
from gemma_qat.quant import Plan, scale_path
from gemma_qat.quant.fake import on_grid
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


def settled(parameters: Mapping[str, Any], fitted: Fitted, held: Iterable[str]) -> dict[str, Any]:
    """Returns the parameters with the masters at the checkpoint paths `held` put on their grid.

    They round to the same codes, and keep them while their scales move a little: what scales alone are trained for.
    Arrays in host memory stay there.
    """
    declared, out = declare(fitted.config), dict(parameters)
    for path in held:
        w, plan = out[path], fitted.plans[path]
        value = _value(w, out[scale_path(path)], plan, declared[path].reduced)
        out[path] = np.asarray(value) if isinstance(w, np.ndarray) else value
    return out


@functools.partial(jax.jit, static_argnums=(2, 3))
def _value(w: jax.Array, scale: jax.Array, plan: Plan, reduced: tuple[int, ...]) -> jax.Array:
    return on_grid(w, scale, plan, reduced)[0]
