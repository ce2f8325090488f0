"""Post-training quantization of a whole model: in memory, into a checkpoint, or from disk to disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from gemma_qat.checkpoint.appear import refuse_overlap, refuse_to_replace
from gemma_qat.checkpoint.beside import Beside
from gemma_qat.checkpoint.native import save_packed
from gemma_qat.companions import companions_of
from gemma_qat.errors import InputError
from gemma_qat.models import Fitted, Gemma4, RunOptions, fit, laid_for_kernels, packed_model
from gemma_qat.ptq import (
    Batch,
    Calibrated,
    CalibrationConfig,
    PtqConfig,
    batch_of,
    quantize_model,
    wants_text,
    write_quantized,
)
from gemma_qat.start import reading_float, resolve_checkpoint

PathLike = str | Path
Progress = Any


def quantize(
    model: Gemma4,
    recipe: str = "q4_0",
    method: str = "rtn",
    calibration: Any = None,
    progress: Progress = None,
    config: PtqConfig = PtqConfig(),
) -> Gemma4:
    """Returns the packed model that post-training quantization makes of a float one.

    `method`: a key of `ptq.METHODS` (docs/ptq.md), options in `config`. `calibration` is text, for methods that
    look at some (all do with `config.importance`) and for static scales of activations: token ids int [B, T], or
    batches with positions and segments.
    Raises: InputError for an unknown recipe or method, a model that is quantized already, or calibration data that is
        missing or unused.
    """
    parts = quantized_parts(model, recipe, method, calibration, progress, config)
    fitted, codes, floats = parts
    return laid_for_kernels(packed_model(codes, floats, fitted, model.options))


def quantized_parts(
    model: Gemma4,
    recipe: str,
    method: str,
    calibration: Any = None,
    progress: Progress = None,
    config: PtqConfig = PtqConfig(),
    static: CalibrationConfig = CalibrationConfig(),
    heard: Callable[[Calibrated], None] | None = None,
) -> tuple[Fitted, dict[str, Any], dict[str, Any]]:
    """Returns (fitted recipe, codes by site, what stays in float) of a post-training quantization."""
    if model.plans:
        raise InputError(f"{model.config.name}: quantized already; give the float model")
    fitted, batches = fit(model.config, recipe), calibration
    _refuse_unused(calibration, fitted, method, config)
    if calibration is not None and not isinstance(calibration, Iterator):
        batches = [batch_of(calibration, model.config.vocab_size)]
    codes, floats = quantize_model(
        model.parameters(), fitted, method, batches, static, model.options, progress, heard, config
    )
    return fitted, codes, floats


def save_quantized(
    model: Gemma4,
    recipe: str,
    method: str,
    out: PathLike,
    calibration: Any = None,
    progress: Progress = None,
    config: PtqConfig = PtqConfig(),
    static: CalibrationConfig = CalibrationConfig(),
    heard: Callable[[Calibrated], None] | None = None,
    beside: Beside = Beside(),
) -> Fitted:
    """Quantizes a float model after training and writes it as a packed checkpoint; returns the fitted recipe.

    `static` says how static scales are found, `heard` is told what calibration found; `beside` goes along
    (`companions_of` the float model's checkpoint); the rest as `quantize`.
    Raises: InputError as `quantize` does, or when something that is no checkpoint is at `out`.
    """
    refuse_to_replace(Path(out))
    parts = quantized_parts(model, recipe, method, calibration, progress, config, static, heard)
    fitted, codes, floats = parts
    save_packed(Path(out), codes, floats, fitted, beside=beside)
    return fitted


def quantize_checkpoint(
    path: PathLike,
    recipe: str,
    method: str,
    out: PathLike,
    batches: Iterable[Batch] | None = None,
    progress: Progress = None,
    config: PtqConfig = PtqConfig(),
    static: CalibrationConfig = CalibrationConfig(),
    heard: Callable[[Calibrated], None] | None = None,
) -> Fitted:
    """Quantizes a float checkpoint into a packed one, from disk to disk, a layer at a time; returns the fitted recipe.

    `path` is a Hugging Face directory, a checkpoint of ours, or anything else that is read as floats. What travels with
    the model goes along; the rest as `save_quantized`.
    Raises: InputError as `quantize` does, for a checkpoint that is quantized, or something at `out` that is none.
    """
    directory = resolve_checkpoint(path)
    refuse_overlap(directory, Path(out))
    refuse_to_replace(Path(out))
    with reading_float(directory) as (size, parameters):
        fitted = fit(size, recipe)
        _refuse_unused(batches, fitted, method, config)
        write_quantized(
            Path(out), parameters, fitted, method, batches, static, RunOptions(), progress, heard,
            config, companions_of(directory),
        )  # fmt: skip
    return fitted


def _refuse_unused(text: Any, fitted: Fitted, method: str, config: PtqConfig) -> None:
    if text is not None and not wants_text(method, fitted, config):
        what = f"recipe {fitted.recipe} has no static scales and {method} looks at no text"
        raise InputError(f"{what}: nothing to calibrate")
