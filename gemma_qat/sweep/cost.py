"""What a group of a sweep costs: tokens that were trained and calibrated on, and seconds of a step.

    steps               updates of one cell
    tokens              positions of the rows that one cell trained on, those of block-wise reconstruction among them
    calibration_tokens  positions at most that one cell looked at beside, forward only
    seconds             median of the reported seconds of a step, over all cells
    over_float          that, over the same of the float reference

Seconds are those of the machine as it was, with whatever else ran on it, and the cells one after another: a ratio of
two of them says less than `gemma-qat bench train`, which takes the steps in turn. A cell's first report is left out,
it holds the compilation.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gemma_qat.config import Cell, PtqCell
from gemma_qat.models import fit, size_named, static_scale_paths
from gemma_qat.ptq import wants_text
from gemma_qat.sweep.plan import Plan


def cost_of(plan: Plan, cells: Sequence[str]) -> dict[str, Any]:
    """Returns the figures above of cells that differ by their seed alone; `seconds` where there are reports."""
    first = plan.cells[cells[0]]
    found: dict[str, Any] = {
        "steps": first.steps,
        "tokens": _trained(first.cell),
        "calibration_tokens": _calibrated(first.cell),
    }
    seconds = [one for name in cells for one in _reported(plan.cells[name].folder)]
    if not seconds:
        return found
    found["seconds"] = statistics.median(seconds)
    own = plan.cells.get(plan.sweep.reference)
    of_float = _reported(own.folder) if own else []
    if of_float:
        found["over_float"] = found["seconds"] / statistics.median(of_float)
    return found


def _trained(cell: Cell) -> int:
    config = cell.config
    if isinstance(cell, PtqCell):
        return 0
    rebuilt = config.blockwise.tokens(config.data.length)["trained"]
    return config.train.steps * config.train.batch_size * config.data.length + rebuilt


def _calibrated(cell: Cell) -> int:
    config = cell.config
    if config.recipe == "float":
        return 0
    fitted = fit(size_named(config.model), config.recipe)
    if isinstance(cell, PtqCell):
        looks = wants_text(cell.method, fitted, config.ptq)
    else:  # Where learned scales start is found in the weights alone.
        looks = bool(static_scale_paths(fitted.plans))
    if not looks:
        return 0
    calibration, length = config.calibration, config.data.length
    return calibration.batches * calibration.batch_size * min(calibration.length or length, length)


def _reported(folder: Path) -> list[float]:
    """Returns the seconds of a step of every report but the first."""
    try:
        lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
        found = [json.loads(line).get("seconds") for line in lines]
    except (OSError, ValueError):
        return []
    return [float(one) for one in found[1:] if one is not None]
