"""Where learned scales start: at the least squared error, or at each tile's extremum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from gemma_qat.models import Fitted
from gemma_qat.ptq import round_to_nearest
from gemma_qat.quant import scale_path


def with_scales(parameters: Mapping[str, Any], fitted: Fitted, init: str) -> dict[str, Any]:
    """Returns the parameters with a float32 scale leaf beside every site whose plan has one.

    `init` is a PTQ method: `mse` or `rtn`.
    Raises: InputError for an unknown one.
    """
    out = fitted.adopt(parameters)
    sites = [path for path, plan in fitted.plans.items() if plan.has_scale_leaf]
    if not sites:
        return out
    start = round_to_nearest(out, fitted, init)
    return out | {scale_path(path): start[path].scale.astype(jnp.float32) for path in sites}
