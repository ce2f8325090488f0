"""Post-training quantization of a whole model: codes by a method, static scales by calibration."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp

from gemma_qat.errors import InputError
from gemma_qat.models import Fitted, RunOptions, packed_model, static_scale_paths
from gemma_qat.numerics import QArray
from gemma_qat.ptq.calibrate import Batch, Calibrated, CalibrationConfig, calibrate
from gemma_qat.ptq.config import PtqConfig
from gemma_qat.ptq.methods import Method, method_named
from gemma_qat.ptq.stream import Stream

Progress = Callable[[str, int, int], None]


def wants_text(method: str, fitted: Fitted, config: PtqConfig = PtqConfig()) -> bool:
    """Returns whether quantizing to a recipe by a method needs text: for the method, or for static scales.

    Raises: InputError for an unknown method.
    """
    return method_named(method).wants_text(config) or bool(static_scale_paths(fitted.plans))


def text_for(
    method: Method,
    fitted: Fitted,
    config: PtqConfig,
    batches: Iterable[Batch] | None,
    calibration: CalibrationConfig,
) -> list[Batch]:
    """Returns the batches that are looked at, at most `calibration.batches`.

    Raises: InputError when there are none where the method or the recipe needs some.
    """
    few = list(itertools.islice(batches or (), calibration.batches))
    if few:
        return few
    if batches is not None and wants_text(method.name, fitted, config):
        raise InputError("calibration: no batches of text given, at least one expected")
    if static_scale_paths(fitted.plans):
        raise InputError(
            f"recipe {fitted.recipe} rounds activations with static scales: give text to calibrate them on"
        )
    if method.wants_text(config):
        raise InputError(
            f"method {method.name} looks at what weights are multiplied with: give text to measure it on"
        )
    return few


def opened(
    parameters: Mapping[str, Any], fitted: Fitted, method: str, config: PtqConfig,
    batches: Iterable[Batch] | None, calibration: CalibrationConfig, options: RunOptions,
    progress: Progress | None,
) -> Stream:  # fmt: skip
    """Returns the quantization of a model about to begin, with the text it looks at.

    Raises: InputError for an unknown method; as `text_for`.
    """
    chosen = method_named(method)
    return Stream(
        parameters=parameters, fitted=fitted, method=chosen, config=config,
        batches=text_for(chosen, fitted, config, batches, calibration), options=options, progress=progress,
    )  # fmt: skip


def quantize_model(
    parameters: Mapping[str, Any],
    fitted: Fitted,
    method: str = "rtn",
    batches: Iterable[Batch] | None = None,
    calibration: CalibrationConfig = CalibrationConfig(),
    options: RunOptions = RunOptions(),
    progress: Progress | None = None,
    heard: Callable[[Calibrated], None] | None = None,
    config: PtqConfig = PtqConfig(),
) -> tuple[dict[str, QArray], dict[str, Any]]:
    """Returns (codes and scales by site, what stays in float with its static scales calibrated).

    `parameters` may be a mapping that reads an array whenever it is asked for one (`ptq/stream.py`). `heard` is told
    what calibration found and what the method has to tell.

    Raises: InputError for an unknown method, or when the method looks at text, or the recipe has static scales, and
        there are no `batches`.
    """
    stream = opened(parameters, fitted, method, config, batches, calibration, options, progress)
    codes: dict[str, QArray] = {}
    floats: dict[str, Any] = {}
    notes: list[str] = []
    for piece in stream.pieces():
        codes |= piece.codes
        floats |= piece.floats
        notes += piece.notes
    codes = {path: codes[path] for path in fitted.plans}
    static = uncalibrated_scales(parameters, fitted)
    found = Calibrated({}, {})
    if static:
        model = packed_model(codes, floats | static, fitted, options)
        found = calibrate(model, stream.batches, calibration, progress)
    if heard and (static or notes):
        heard(dataclasses.replace(found, notes=tuple(notes)))
    return codes, floats | static | found.scales


def uncalibrated_scales(parameters: Mapping[str, Any], fitted: Fitted) -> dict[str, Any]:
    """Returns the static scales that a packed model has, those of `parameters` or 0."""
    given = frozenset(parameters)
    return {
        path: parameters[path] if path in given else jnp.zeros(1, jnp.float32)
        for path in static_scale_paths(fitted.plans)
    }
