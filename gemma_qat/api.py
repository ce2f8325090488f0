"""The face of the package: what notebooks call and what the command line is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_qat.checkpoint.huggingface import read_parameters
from gemma_qat.checkpoint.manifest import Manifest
from gemma_qat.checkpoint.native import load_model, load_parameters, save_packed
from gemma_qat.config import ExperimentConfig, to_json
from gemma_qat.decode import generate
from gemma_qat.errors import InputError
from gemma_qat.models import (
    SIZES,
    Fitted,
    Gemma4,
    ModelConfig,
    RunOptions,
    declare,
    fit,
    float_parameters,
    initialize,
    packed_model,
    size_named,
)
from gemma_qat.ptq import round_to_nearest
from gemma_qat.quant import coverage as coverage_rows
from gemma_qat.train import Trained, latest_save, with_scales
from gemma_qat.train import train as run_training

PathLike = str | Path
Progress = Any


def resolve_checkpoint(path: PathLike) -> Path:
    """Returns the directory that holds a checkpoint: `path` itself, or the latest save of a run.

    Raises: FileNotFoundError saying what was looked for.
    """
    directory = Path(path)
    if not directory.exists():
        raise FileNotFoundError(f"{directory}: no such checkpoint")
    if not directory.is_dir():
        raise InputError(f"{directory}: a checkpoint directory expected, this is a file")
    holds = any((directory / name).is_file() for name in ("manifest.json", "config.json"))
    if holds and not (directory / "checkpoints").is_dir():
        return directory
    for runs in (directory / "checkpoints", directory):
        last = latest_save(runs) if runs.is_dir() else None
        if last is not None:
            return last
    raise FileNotFoundError(
        f"{directory}: neither a Hugging Face directory (config.json) nor a checkpoint of this project (manifest.json)"
    )


def load(
    path: PathLike, dtype: str = "float32", recipe: str | None = None, mesh: Any = None
) -> Gemma4:
    """Returns the model at `path`: a Hugging Face directory, a native checkpoint or a packed export.

    `dtype` is that of activations. `recipe` fake-quantizes a float checkpoint on that recipe's grid, scales recomputed.
    `mesh` places the leaves as the rule table says.
    Raises: FileNotFoundError; InputError in one line for anything that does not fit.
    """
    options = RunOptions(dtype=_dtype(dtype))
    directory = resolve_checkpoint(path)
    if (directory / "manifest.json").is_file() and recipe is None:
        model = load_model(directory, options)
    else:
        config, parameters = read_float(directory)
        if recipe is None:
            model = Gemma4.from_parameters(config, parameters, None, options)
        else:
            fitted = fit(config, recipe)
            model = Gemma4.from_parameters(
                fitted.config, fitted.adopt(parameters), fitted.plans, options
            )
    return model if mesh is None else _placed(model, mesh, options)


def read_float(path: PathLike) -> tuple[ModelConfig, dict[str, jax.Array]]:
    """Returns the config and float32 parameters of a Hugging Face directory or a native float checkpoint.

    Raises: InputError when the checkpoint is quantized.
    """
    directory = resolve_checkpoint(path)
    if (directory / "manifest.json").is_file():
        manifest, parameters = load_parameters(directory)
        if manifest.kind != "float":
            raise InputError(
                f"{directory}: a float checkpoint expected, this one is {manifest.kind} ({manifest.recipe})"
            )
        return manifest.config, parameters
    config, arrays = read_parameters(directory)
    return config, {name: jnp.asarray(array, jnp.float32) for name, array in arrays.items()}


def quantize(
    model: Gemma4,
    recipe: str = "q4_0",
    method: str = "rtn",
    calibration: Any = None,
    progress: Progress = None,
) -> Gemma4:
    """Returns the packed model that post-training quantization makes of a float one.

    `method`: `rtn` (each tile's extremum) or `mse` (searched scales); neither looks at data, so `calibration`
    has to be None.
    Raises: InputError for an unknown recipe or method, a model that is quantized already, or unused calibration data.
    """
    if calibration is not None:
        raise InputError(f"method {method} does not use calibration data")
    fitted, codes, floats = quantized_parts(model, recipe, method, progress)
    return packed_model(codes, floats, fitted, model.options)


def quantized_parts(
    model: Gemma4, recipe: str, method: str, progress: Progress = None
) -> tuple[Fitted, dict[str, Any], dict[str, Any]]:
    """Returns (fitted recipe, codes by site, what stays in float) of a post-training quantization."""
    if model.plans:
        raise InputError(f"{model.config.name}: quantized already; give the float model")
    fitted = fit(model.config, recipe)
    parameters = fitted.adopt(model.parameters())
    codes = round_to_nearest(parameters, fitted, method, progress)
    return fitted, codes, float_parameters(parameters, fitted)


def save_quantized(
    model: Gemma4, recipe: str, method: str, out: PathLike, progress: Progress = None
) -> Fitted:
    """Quantizes a float model after training and writes it as a packed checkpoint; returns the fitted recipe."""
    fitted, codes, floats = quantized_parts(model, recipe, method, progress)
    save_packed(Path(out), codes, floats, fitted)
    return fitted


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


def train(config: ExperimentConfig, progress: Progress = None) -> Trained:
    """Trains as `config` says and returns parameters and curves; files go to `directory/name`.

    Started again with the same config it goes on where it stopped, and equals a run that never did.
    Raises: InputError for anything in the config that does not fit together, before any training.
    """
    from gemma_qat.data.files import training_rows
    from gemma_qat.data.loader import make_loader

    run = Path(config.directory) / config.name
    model, parameters = _start(config)
    teacher = _teacher(config) if config.train.loss == "kl" else None
    size = model if isinstance(model, ModelConfig) else model.config
    rows = training_rows(config.data, progress)
    if rows.vocab_size != size.vocab_size:
        raise InputError(
            f"tokenizer has {rows.vocab_size} pieces, but {size.name} has a vocabulary of {size.vocab_size}"
        )
    loader = make_loader(rows.train, batch_size=config.train.batch_size, seed=config.train.seed)
    _describe(run, config)
    return run_training(
        model, parameters, loader, config.train, config.optimizer,
        mesh_config=config.mesh, options=config.options, teacher=teacher,
        directory=run / "checkpoints", progress=progress, label=f"train {config.name}",
    )  # fmt: skip


def _start(config: ExperimentConfig) -> tuple[ModelConfig | Fitted, Mapping[str, Any]]:
    size = size_named(config.model)
    if config.start:
        found, parameters = read_float(config.start)
        if dataclasses.replace(found, name=size.name) != size:
            raise InputError(f"{config.start}: not a checkpoint of {size.name}")
    elif config.train.loss == "kl":
        raise InputError(
            "train.loss=kl needs a float checkpoint to distil from: give start or teacher"
        )
    else:
        parameters = initialize(size, config.train.seed)
    if config.recipe == "float":
        return size, parameters
    fitted = fit(size, config.recipe, config.scales)
    return fitted, with_scales(parameters, fitted, config.scale_init)


def _teacher(config: ExperimentConfig) -> tuple[ModelConfig, Mapping[str, Any]]:
    return read_float(config.teacher or config.start)


def _describe(run: Path, config: ExperimentConfig) -> None:
    """Writes the resolved config and the coverage table beside the checkpoints."""
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.json").write_text(to_json(config), "utf-8")
    rows = coverage(config.model, config.recipe)
    lines = [
        f"{r['site']:<44}{r['format']:<10}{r['bits']:>7.3f} bits{r['bytes']:>16,.0f} B{r['share']:>8.2%}"
        for r in rows
    ]
    (run / "coverage.txt").write_text("\n".join(lines) + "\n", "utf-8")


def evaluate(
    models: Mapping[str, Gemma4],
    reference: Gemma4,
    text: Sequence[PathLike],
    tokenizer: Any,
    *,
    length: int = 128,
    draws: int = 2000,
    progress: Progress = None,
) -> dict[str, Any]:
    """Returns summaries of each model against the reference on text files, with bootstrap intervals by file.

    Raises: InputError when there are fewer than two files, or a vocabulary that does not match.
    """
    from gemma_qat.data.files import evaluation_rows
    from gemma_qat.data.token_bytes import token_bytes
    from gemma_qat.evals import Resamples, summarize
    from gemma_qat.evals.score import score

    rows = evaluation_rows(text, tokenizer, length)
    own, scored = score(models, reference, rows, token_bytes(tokenizer), progress=progress)
    resamples = Resamples(own.documents, seed=0, draws=draws)
    summaries = {name: summarize(records, resamples) for name, records in scored.items()}
    return {"reference": summarize(own, resamples), "models": summaries}


def export(
    model_or_path: PathLike, *, format: str, out: PathLike, tokenizer: Any = None
) -> dict[str, int]:
    """Writes a quantized checkpoint in `format` (`gguf` or `native`) and returns its size.

    The stored codes are written; nothing is derived again. The file is read back and compared before it appears.
    Raises: InputError for a float checkpoint, an unknown format, or a format that cannot carry the recipe.
    """
    from gemma_qat.export import exporter_named
    from gemma_qat.export.source import artifact_of

    exporter = exporter_named(format)
    artifact = artifact_of(resolve_checkpoint(model_or_path), tokenizer)
    return exporter(artifact, Path(out))


def _placed(model: Gemma4, mesh: Any, options: RunOptions) -> Gemma4:
    from gemma_qat.models import leaf_shardings

    if any(not isinstance(leaf, (jax.Array, np.ndarray)) for leaf in model.leaves().values()):
        raise InputError("packed models are not placed on a mesh yet; load them without one")
    plans = dict(model.plans)
    where = leaf_shardings(model.config, plans, mesh, "fsdp")
    return Gemma4(model.config, jax.device_put(model.leaves(), where), plans, options)


def _dtype(name: str) -> str:
    if name not in ("float32", "bfloat16"):
        raise InputError(f"dtype {name!r}: float32 or bfloat16 expected")
    return name


__all__ = [
    "SIZES",
    "Manifest",
    "coverage",
    "evaluate",
    "export",
    "generate",
    "load",
    "quantize",
    "read_float",
    "resolve_checkpoint",
    "save_quantized",
    "train",
]
