"""A float checkpoint becomes a packed one on disk, a piece at a time.

    quantized/00000 ...    words and scales of each piece of `stream.py`: a table, a layer
    parameters/00000 ...   what of it stays in float, as the source stores it; static scales in a part of their own

All of it stands under a temporary name until it is complete. Static scales are calibrated at the end, on the packed
model as it was written.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gemma_qat.checkpoint.appear import appearing
from gemma_qat.checkpoint.beside import Beside
from gemma_qat.checkpoint.manifest import Manifest
from gemma_qat.checkpoint.native import load_model
from gemma_qat.checkpoint.packing import packed_by_rows
from gemma_qat.checkpoint.store import save_part, write_json
from gemma_qat.models import Fitted, RunOptions
from gemma_qat.ptq.calibrate import Batch, Calibrated, CalibrationConfig, calibrate
from gemma_qat.ptq.config import PtqConfig
from gemma_qat.ptq.quantize import Progress, opened, uncalibrated_scales
from gemma_qat.ptq.stream import Piece


def write_quantized(
    out: Path,
    parameters: Mapping[str, Any],
    fitted: Fitted,
    method: str = "rtn",
    batches: Iterable[Batch] | None = None,
    calibration: CalibrationConfig = CalibrationConfig(),
    options: RunOptions = RunOptions(),
    progress: Progress | None = None,
    heard: Callable[[Calibrated], None] | None = None,
    config: PtqConfig = PtqConfig(),
    beside: Beside = Beside(),
) -> None:
    """Writes what `quantize_model` returns as a packed checkpoint at `out`, `beside` along with it.

    `parameters` may read an array whenever it is asked for one: a layer of them, or a table, is held at a time.
    Raises: InputError as `quantize_model`, or when something that is no checkpoint is at `out`; then nothing appears.
    """
    stream = opened(parameters, fitted, method, config, batches, calibration, options, progress)
    notes: list[str] = []
    with appearing(out) as temporary:
        number = 0
        for piece in stream.pieces():
            _save(temporary, number, piece)
            notes += piece.notes
            number += 1
        static = uncalibrated_scales(parameters, fitted)
        if static:
            _save(temporary, number, Piece(floats=static))
        manifest = Manifest(
            kind="packed", config=fitted.config, recipe=fitted.recipe, plans=fitted.plans,
            imported=fitted.imported,
        )  # fmt: skip
        write_json(temporary / "manifest.json", manifest.to_json())
        found = Calibrated({}, {})
        if static:
            found = calibrate(load_model(temporary, options), stream.batches, calibration, progress)
            shutil.rmtree(_part(temporary, "parameters", number))
            _save(temporary, number, Piece(floats=static | found.scales))
        beside.keep(temporary)
    if heard and (static or notes):
        heard(dataclasses.replace(found, notes=tuple(notes)))


def _part(directory: Path, name: str, number: int) -> Path:
    return directory / name / f"{number:05}"


def _save(directory: Path, number: int, piece: Piece) -> None:
    words = {
        f"{path}/{name}": array
        for path, q in piece.codes.items()
        for name, array in packed_by_rows(q).items()
    }
    floats = {path: np.asarray(leaf) for path, leaf in jax.device_get(piece.floats).items()}
    for name, arrays in (("quantized", words), ("parameters", floats)):
        if arrays:
            save_part(_part(directory, name, number), arrays)
