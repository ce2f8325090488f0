"""The face of the package: what notebooks call and what the command line is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gemma_qat.checkpoint.appear import refuse_overlap, refuse_to_replace
from gemma_qat.checkpoint.manifest import Manifest
from gemma_qat.checkpoint.native import save_static_scales
from gemma_qat.companions import companions_of, open_towers
from gemma_qat.config import ExperimentConfig, SweepConfig
from gemma_qat.convert import Converted, Tally, on_lattice
from gemma_qat.convert import convert as run_conversion
from gemma_qat.data.held_out import HeldOut
from gemma_qat.decode import generate
from gemma_qat.errors import InputError
from gemma_qat.evaluation import EvaluationConfig
from gemma_qat.evaluation import run as run_evaluation
from gemma_qat.export import (
    HubOptions,
    Lengths,
    artifact_of,
    export_checkpoint,
    figures,
    model_of,
)
from gemma_qat.loading import load
from gemma_qat.mixing import SensitivityConfig
from gemma_qat.mixing import run as run_sensitivity
from gemma_qat.models import (
    SIZES,
    Gemma4,
    ModelConfig,
    declare,
    fit,
    size_named,
    static_scale_paths,
)
from gemma_qat.ptq import Batch, Calibrated, CalibrationConfig, PtqConfig
from gemma_qat.ptq import calibrate as run_calibration
from gemma_qat.quant import coverage as coverage_rows
from gemma_qat.quantizing import quantize, quantize_checkpoint, quantized_parts, save_quantized
from gemma_qat.self_generated import SelfConfig, self_generate
from gemma_qat.start import read_float, resolve_checkpoint
from gemma_qat.sweep import run as run_sweep
from gemma_qat.tasks import TaskConfig, check_tasks, run_tasks
from gemma_qat.train import Stop, Trained
from gemma_qat.training import run as run_training

PathLike = str | Path
Progress = Any


def calibrate(
    path: PathLike,
    batches: Iterable[Batch],
    config: CalibrationConfig = CalibrationConfig(),
    out: PathLike | None = None,
    progress: Progress = None,
) -> Calibrated:
    """Measures the static scales of a quantized checkpoint on `batches` and writes them into it (or a copy at `out`).

    Raises: InputError for a float checkpoint, one whose recipe has no static scales, or batches without data.
    """
    directory = resolve_checkpoint(path)
    refuse_to_replace(Path(out) if out else directory)
    model = load(directory)
    if not static_scale_paths(dict(model.plans)):
        what = "a float checkpoint" if not model.plans else "its recipe has no static scales"
        raise InputError(f"{directory}: nothing to calibrate ({what})")
    found = run_calibration(model, batches, config, progress)
    save_static_scales(directory, found.scales, Path(out) if out else directory)
    return found


def coverage(model_or_size: Gemma4 | ModelConfig | str, recipe: str) -> list[dict[str, Any]]:
    """Returns a row per stored array: site, role, shape, format, bits per weight, bytes, share.

    Raises: InputError for an unknown size or recipe, or one that does not fit the other.
    """
    if isinstance(model_or_size, str):
        config = size_named(model_or_size)
    else:
        config = model_or_size if isinstance(model_or_size, ModelConfig) else model_or_size.config
    if recipe == "float":
        return [dataclasses.asdict(row) for row in coverage_rows(declare(config).values(), {})]
    fitted = fit(config, recipe)
    rows = coverage_rows(declare(fitted.config).values(), fitted.plans)
    return [dataclasses.asdict(row) for row in rows]


def train(config: ExperimentConfig, progress: Progress = None, stop: Stop | None = None) -> Trained:
    """Trains as `config` says and returns parameters and curves; files go to `directory/name`.

    Started again with the same config it goes on where it stopped, and equals a run that never did. `stop` is asked
    after every step whether to end there.
    Raises: InputError for anything in the config that does not fit together, before any training; Stopped when `stop`
    said so and all is saved.
    """
    return run_training(config, progress, stop)


def sweep(
    config: SweepConfig, redo: bool = False, progress: Progress = None, stop: Stop | None = None
) -> dict[str, Any]:
    """Makes and measures every cell of a sweep that is not done; returns what all came to (`sweep/results.py`).

    Files go to `directory/name`. `redo` makes cells again whose config changed; what went wrong is in `failed`.
    Raises: InputError for anything that does not fit together, before any training; Stopped as `train`.
    """
    return run_sweep(config, redo=redo, progress=progress, stop=stop)


def evaluate(
    models: Mapping[str, Gemma4 | PathLike],
    reference: Gemma4 | PathLike,
    text: HeldOut | Sequence[PathLike],
    tokenizer: Any = None,
    config: EvaluationConfig = EvaluationConfig(),
    own: Mapping[str, Gemma4 | PathLike | None] | None = None,
    progress: Progress = None,
    tasks: TaskConfig = TaskConfig(),
) -> dict[str, Any]:
    """Returns what models keep of a reference on held-out text: perplexity, KL, same top, with intervals by document.

    Models and reference: whatever `load` reads, as a path, or loaded; a path may end in `+RECIPE`, for the float
    checkpoint on that recipe's grid. `text`: files, folders or datasets (or `data.held_out.held_out` of them);
    `tokenizer` by default the reference's own. A QAT checkpoint is measured against its fake-quantized self too; `own`
    names other models to measure each against. `tasks` names lm-eval's, which are run on the reference and every model.
    The schema is in `evaluation.py`.
    Raises: InputError when there are fewer than two documents, a vocabulary that does not match, or no such task.
    """
    check_tasks(tasks, models)
    found = run_evaluation(models, reference, text, tokenizer, config, own or {}, progress)
    if tasks.names:
        every = {"reference": reference, **models}
        found["tasks"] = run_tasks(every, tokenizer, tasks, config, progress)
    return found


def sensitivity(
    reference: Gemma4 | PathLike,
    text: HeldOut | Sequence[PathLike],
    tokenizer: Any = None,
    how: SensitivityConfig = SensitivityConfig(),
    config: EvaluationConfig = EvaluationConfig(),
    progress: Progress = None,
) -> dict[str, Any]:
    """Returns how much KL quantizing each class of sites of a float model adds on held-out text, largest first.

    Everything but that class stays in float, activations too. `how` says whose grids, what a class is, and, with a
    budget of bytes, the formats among which the mix that loses least is found, measured, and written as a recipe file
    that trains. The schema is in `mixing.py`; `evals.plot_sensitivity.sensitivity_bars` draws its rows.
    Raises: InputError for a model that is quantized, fewer than two documents, a budget that nothing fits into.
    """
    return run_sensitivity(reference, text, tokenizer, how, config, progress)


def export(
    model_or_path: PathLike,
    *,
    format: str,
    out: PathLike,
    tokenizer: Any = None,
    masters: bool = False,
    hub: HubOptions = HubOptions(),
    carry: bool = True,
    lengths: Lengths = Lengths(),
) -> dict[str, int]:
    """Writes a checkpoint in `format` (a key of `export.EXPORTERS`) and returns its size.

    The stored codes are written; nothing is derived again. What is written is read back and compared before it appears.
    With `masters` a QAT checkpoint's float masters are written instead; `hub` is for directories of the hub, `lengths`
    for LiteRT. Without a tokenizer, a GGUF file or a `.litertlm` bundle gets the one that travels with the checkpoint;
    a float directory of the hub gets the towers (vision, audio) that came with it unless `carry` is off.
    Raises: InputError for an unknown format, or a format that cannot carry the recipe.
    """
    from gemma_qat.data.tokenizer import Tokenizer, tokenizer_among

    directory = resolve_checkpoint(model_or_path)
    refuse_overlap(directory, Path(out))
    beside = companions_of(directory)
    if tokenizer is None and format in ("gguf", "litert"):
        file = tokenizer_among(beside.files)
        tokenizer = Tokenizer.load(file) if file else None
    with open_towers(beside.towers if carry and format == "huggingface" else None) as towers:
        return export_checkpoint(
            directory, Path(out), format=format, tokenizer=tokenizer, masters=masters,
            hub=dataclasses.replace(hub, towers=towers), lengths=lengths, beside=beside,
        )  # fmt: skip


def verify_export(
    model_or_path: PathLike,
    *,
    format: str,
    out: PathLike,
    text: Sequence[PathLike] = (),
    tokenizer: Any = None,
    masters: bool = False,
    length: int = 128,
    progress: Progress = None,
) -> dict[str, Any]:
    """Returns the figures of an export beside its checkpoint: what differs, bytes, bits per weight.

    With `text` and a tokenizer also `summary`: the model that stands in the file, measured on the text against the
    fake-quantized model (KL, top-1).
    Raises: FileNotFoundError; InputError for what cannot be read.
    """
    directory = resolve_checkpoint(model_or_path)
    artifact = artifact_of(directory, masters=masters)
    found: dict[str, Any] = figures(artifact, format, Path(out))
    if text:
        exported = model_of(artifact, format, Path(out))
        how = EvaluationConfig(length=length)
        result = evaluate(
            {"export": exported}, load(directory), text, tokenizer, how, progress=progress
        )
        found["summary"] = result["models"]["export"]["summary"]
    return found


def convert(
    path: PathLike,
    *,
    out: PathLike,
    carry: bool | None = None,
    recover: str | None = None,
    tally: Tally | None = None,
    progress: Progress = None,
) -> Converted:
    """Writes a checkpoint of any format that is read as a native one: floats in their own dtype, codes as they are.

    Array by array, so that memory stays near the largest. Started again after it was killed it goes on. `carry` takes
    along what is not the decoder's (vision, audio), by default from the hub's formats; else the manifest names it.
    `recover` names the recipe on whose q4_0 lattice the bfloat16 weights of the source lie: its codes and scales are
    found again, and `tally` is told how (`convert/lattice.py`).
    Raises: FileNotFoundError; InputError for a source that is broken or not known, or a disk that is too small.
    """
    refuse_overlap(Path(path), Path(out))
    more: dict[str, Any] = {} if progress is None else {"report": progress}
    if recover is not None:
        found = tally or Tally()
        more["change"] = lambda source: on_lattice(source, recover, found)
    return run_conversion(Path(path), Path(out), carry=carry, **more)


__all__ = [
    "SIZES",
    "CalibrationConfig",
    "Manifest",
    "PtqConfig",
    "SelfConfig",
    "SensitivityConfig",
    "calibrate",
    "companions_of",
    "convert",
    "coverage",
    "evaluate",
    "export",
    "generate",
    "load",
    "quantize",
    "quantize_checkpoint",
    "quantized_parts",
    "read_float",
    "resolve_checkpoint",
    "save_quantized",
    "self_generate",
    "sensitivity",
    "sweep",
    "train",
    "verify_export",
]
