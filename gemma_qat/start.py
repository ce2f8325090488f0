"""Where a run begins: a checkpoint of any kind, or fresh numbers, every array where the mesh wants it.

With a `Placement` each device reads or draws its own part, so that no host and no device ever holds a whole model.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_qat.checkpoint.manifest import Manifest
from gemma_qat.checkpoint.native import check_arrays_of, load_parameters, load_quantized
from gemma_qat.checkpoint.native_source import NativeReading, float_manifest
from gemma_qat.checkpoint.source import Reading, Source
from gemma_qat.checkpoint.store import read_manifest
from gemma_qat.config import ExperimentConfig
from gemma_qat.convert import FORMATS, open_source
from gemma_qat.errors import InputError, beside, refuse_address
from gemma_qat.models import (
    Fitted,
    ModelConfig,
    abstract_parameters,
    declare,
    fit,
    initialize,
    layer_shardings,
    size_named,
)
from gemma_qat.plan import Workload
from gemma_qat.quant import scale_path
from gemma_qat.sharding import Placement, from_host
from gemma_qat.train import latest_save
from gemma_qat.train.hidden import check_states


def resolve_checkpoint(path: str | Path) -> Path:
    """Returns the directory that holds a checkpoint: `path` itself, or the latest save of a run.

    Raises: FileNotFoundError saying what was looked for.
    """
    refuse_address(path)
    directory = Path(path)
    if not directory.exists():
        raise FileNotFoundError(f"{directory}: no such checkpoint{beside(directory)}")
    if not directory.is_dir():
        if any(row.looks(directory) for row in FORMATS):
            return directory
        raise InputError(f"{directory}: a checkpoint directory expected, this is a file")
    holds = any((directory / name).is_file() for name in ("manifest.json", "config.json"))
    if holds and not (directory / "checkpoints").is_dir():
        return directory
    for runs in (directory / "checkpoints", directory):
        last = latest_save(runs) if runs.is_dir() else None
        if last is not None:
            return last
    if any(row.looks(directory) for row in FORMATS):
        return directory
    raise FileNotFoundError(
        f"{directory}: neither a Hugging Face directory (config.json) nor a checkpoint of this project (manifest.json)"
    )


def read_float(
    path: str | Path, placement: Placement | None = None
) -> tuple[ModelConfig, dict[str, jax.Array]]:
    """Returns the config and float32 parameters of a native float checkpoint or a foreign one of any format.

    A foreign one is read tensor by tensor: a host holds one at a time.
    Raises: InputError when the checkpoint is quantized.
    """
    directory = resolve_checkpoint(path)
    if (directory / "manifest.json").is_file():
        float_manifest(directory)
        manifest, parameters = load_parameters(directory, placement)
        return manifest.config, parameters
    with open_source(directory) as source:
        _refuse_plans(directory, source)
        where = where_layers_lie(source.config, placement)
        read = {
            leaf.path: _float32(np.asarray(leaf.read()), where.get(leaf.path))
            for leaf in source.leaves
        }
        return source.config, {path: read[path] for path in declare(source.config)}


@contextlib.contextmanager
def reading_float(path: str | Path) -> Iterator[tuple[ModelConfig, Mapping[str, Any]]]:
    """Gives the config of a checkpoint that `read_float` reads, and its arrays, each read when it is asked for.

    Raises: as `read_float`.
    """
    directory = resolve_checkpoint(path)
    if (directory / "manifest.json").is_file():
        native = NativeReading(directory)
        yield native.config, native
        return
    with open_source(directory) as source:
        _refuse_plans(directory, source)
        yield source.config, Reading(source)


def float_config(path: str | Path) -> ModelConfig:
    """Returns the config of a checkpoint that `read_float` reads; names and headers are read, no arrays.

    Raises: as `read_float`; InputError when an array of ours is missing or has another shape.
    """
    directory = resolve_checkpoint(path)
    if (directory / "manifest.json").is_file():
        float_manifest(directory)
        return check_arrays_of(directory).config
    with open_source(directory) as source:
        _refuse_plans(directory, source)
        return source.config


def _refuse_plans(directory: Path, source: Source) -> None:
    if source.plans:
        raise InputError(
            f"{directory}: a float checkpoint expected, this one is quantized ({source.format}); "
            "gemma-qat convert brings it in with its codes"
        )


def _float32(array: np.ndarray, where: Any) -> jax.Array:
    return jnp.asarray(array, jnp.float32) if where is None else from_host(array, where, np.float32)


def where_layers_lie(config: ModelConfig, placement: Placement | None) -> dict[str, Any]:
    """Returns the sharding of every parameter by checkpoint path; none without a placement."""
    if placement is None:
        return {}
    return layer_shardings(config, {}, placement.mesh, placement.preset)


def model_of(config: ExperimentConfig) -> ModelConfig | Fitted:
    """Returns the model a config asks for; reads nothing.

    Raises: InputError for an unknown size or recipe, or a recipe that does not fit the size.
    """
    size = size_named(config.model)
    if config.recipe == "float":
        return size
    return fit(
        size, config.recipe, config.scales,
        gradient=config.gradient, learn_activations=config.learn_activations,
    )  # fmt: skip


def workload_of(config: ExperimentConfig) -> Workload:
    """Returns the step that a config trains with, to be planned; reads nothing.

    Raises: InputError as `model_of`, and for a chunk of the loss that does not divide the rows.
    """
    distils = config.train.needs_teacher and not config.teacher_cache
    return Workload(
        name=config.name, model=model_of(config), length=config.data.length,
        teacher=size_named(config.model) if distils else None, train=config.train,
        optimizer=config.optimizer, mesh=config.mesh, options=config.options, lora=config.lora,
    )  # fmt: skip


def start_of(
    config: ExperimentConfig, placement: Placement | None = None
) -> tuple[ModelConfig | Fitted, Mapping[str, Any]]:
    """Returns the model a config asks for and the parameters it starts from, by checkpoint path.

    Raises: InputError when the start, recipe, scales and model do not fit together.
    """
    size, fitted = size_named(config.model), model_of(config)
    if isinstance(fitted, Fitted) and config.start and _is_quantized(config.start):
        return _retained_start(config, resolve_checkpoint(config.start), fitted, placement)
    check_start(config)
    if config.start:
        return fitted, read_float(config.start, placement)[1]
    return fitted, initialize(size, config.train.seed, where_layers_lie(size, placement))


def check_start(config: ExperimentConfig) -> None:
    """Refuses what `start_of` cannot begin from; names and headers are read, no arrays.

    Raises: FileNotFoundError; InputError when the start, recipe, scales and model do not fit together.
    """
    size, fitted = size_named(config.model), model_of(config)
    if isinstance(fitted, Fitted):
        if config.start and _is_quantized(config.start):
            _check_retained(config, resolve_checkpoint(config.start), fitted)
            return
        if config.scales == "frozen":
            raise InputError(
                "scales=frozen keeps the scales of a quantized start: give one on the grids of "
                f"{config.recipe}, or scales=learned or recomputed"
            )
    if config.start:
        if dataclasses.replace(float_config(config.start), name=size.name) != size:
            raise InputError(f"{config.start}: not a checkpoint of {size.name}")
    elif config.train.needs_teacher and not config.teacher_cache:
        raise InputError(
            f"{config.train.asks_for_teacher} needs a float checkpoint to distil from: give start or teacher"
        )


def _retained_start(
    config: ExperimentConfig,
    directory: Path,
    fitted: Fitted,
    placement: Placement | None = None,
) -> tuple[Fitted, Mapping[str, Any]]:
    manifest = _check_retained(config, directory, fitted)
    fitted = dataclasses.replace(fitted, imported=manifest.imported)
    return fitted, retained(directory, fitted, placement)


def _check_retained(config: ExperimentConfig, directory: Path, fitted: Fitted) -> Manifest:
    if config.blockwise.steps:
        raise InputError(
            f"blockwise.steps={config.blockwise.steps}: layers are rebuilt after a float start, {config.start} is "
            "quantized"
        )
    manifest = check_arrays_of(directory)
    stored = manifest.kind == "packed" or any(p.has_scale_leaf for p in manifest.plans.values())
    if config.scales == "recomputed" and stored:
        raise InputError(
            f"scales=recomputed would drop the scales that {config.start} is quantized with: give scales=frozen or "
            "learned, or start from a float checkpoint"
        )
    _refuse_other_grids(directory, manifest, fitted)
    return manifest


def _is_quantized(start: str) -> bool:
    directory = resolve_checkpoint(start)
    return (directory / "manifest.json").is_file() and read_manifest(directory).kind != "float"


def retained(directory: Path, fitted: Fitted, placement: Placement | None = None) -> dict[str, Any]:
    """Returns the masters of a quantized checkpoint with the scales it was saved with, static ones included.

    A packed checkpoint has no masters: the values of its codes are, and they round to the same codes again.
    Raises: InputError when its sites, grids or model are not those of `fitted`.
    """
    manifest, quantized = load_quantized(directory, placement)
    _refuse_other_grids(directory, manifest, fitted)
    _, parameters = load_parameters(directory, placement)
    masters = {path: q.dequantize() for path, q in quantized.items()} | parameters
    given = [path for path, plan in fitted.plans.items() if plan.has_scale_leaf]
    scales = {scale_path(path): quantized[path].scale.astype(jnp.float32) for path in given}
    wanted = abstract_parameters(fitted.config, fitted.plans)
    return scales | {path: leaf for path, leaf in masters.items() if path in wanted}


def _refuse_other_grids(directory: Path, manifest: Manifest, fitted: Fitted) -> None:
    if dataclasses.replace(manifest.config, name=fitted.config.name) != fitted.config:
        raise InputError(f"{directory}: not a checkpoint of {fitted.config.name}")
    grids = {path: plan.weight for path, plan in fitted.plans.items()}
    if {path: plan.weight for path, plan in manifest.plans.items()} != grids:
        raise InputError(
            f"{directory}: quantized by {manifest.recipe} on other grids than those of {fitted.recipe}"
        )


def teacher_of(
    config: ExperimentConfig, placement: Placement | None = None
) -> tuple[ModelConfig, Mapping[str, Any]]:
    """Returns the float model that a config learns from, and its parameters by checkpoint path.

    Raises: as `check_teacher`.
    """
    check_teacher(config)
    return read_float(config.teacher or config.start, placement)


def check_teacher(config: ExperimentConfig) -> ModelConfig:
    """Returns the config of the float model that a config learns from; names and headers are read, no arrays.

    Raises: FileNotFoundError; InputError when there is none, it is quantized, or has another vocabulary or, where
        hidden states are compared, other ones.
    """
    if not config.teacher and config.start and _is_quantized(config.start):
        asked = config.train.asks_for_teacher or "a teacher's words"
        raise InputError(f"{asked} from a quantized start needs a float checkpoint as teacher")
    if not config.teacher and not config.start:
        raise InputError("no teacher: give teacher or start, a float checkpoint")
    found, size = float_config(config.teacher or config.start), size_named(config.model)
    if found.vocab_size != size.vocab_size:
        raise InputError(
            f"{config.teacher or config.start}: a vocabulary of {found.vocab_size}, that of {size.name} is "
            f"{size.vocab_size}"
        )
    if config.train.hidden_weight:
        check_states(config.train.hidden, size, found, config.teacher or config.start)
    return found
