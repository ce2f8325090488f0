"""From an experiment's config to a run: where it starts, what it learns from, what it writes beside its checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from gemma_qat.checkpoint.beside import Beside
from gemma_qat.checkpoint.native import save_packed
from gemma_qat.checkpoint.store import write_json
from gemma_qat.companions import companions_of
from gemma_qat.config import ExperimentConfig, to_json
from gemma_qat.errors import InputError, Stopped
from gemma_qat.models import (
    Fitted,
    ModelConfig,
    abstract_parameters,
    declare,
    fit,
    size_named,
)
from gemma_qat.numerics import refuse_nonfinite
from gemma_qat.ptq import Batch, quantize_model, wants_text
from gemma_qat.quant import coverage, scale_path
from gemma_qat.redaction import shown
from gemma_qat.run_folder import RunFolder
from gemma_qat.runs import marked_as_running, wait_until_left
from gemma_qat.sharding import Placement, batch_share, make_mesh
from gemma_qat.start import model_of, start_of, teacher_of
from gemma_qat.train import (
    Program,
    Stop,
    Student,
    Trained,
    add_adapters,
    forget_layers,
    is_first,
    latest_save,
    program_of,
    reconstruct,
    refuse_apart,
    settled,
    train,
    with_scales,
)
from gemma_qat.train.points import Listener
from gemma_qat.train.speed import MetricsFile
from gemma_qat.train.teacher_cache import CachedTeacher, Part, write_cache
from gemma_qat.train.tensorboard import TensorBoard

Progress = Callable[[str, int, int], None]


def run(
    config: ExperimentConfig,
    progress: Progress | None = None,
    stop: Stop | None = None,
    listeners: Sequence[Listener] = (),
) -> Trained:
    """Trains as `config` says and returns parameters and curves; files go to `directory/name`.

    `listeners` hear of every report, in the first process only, beside the files that are written.
    Several processes (`train.join`) each call it with the same config, on file systems that show the same files.
    Raises: InputError for anything in the config that does not fit together, before any training; Stopped after the
    step at which `stop` said so, when it is saved.
    """
    from gemma_qat.data.files import training_rows

    directory = config.folder
    mesh = make_mesh(config.mesh)
    program = program_for(config, mesh)  # Before anything is read: what does not fit is refused.
    refuse_apart(Path(config.directory))
    if is_first():
        wait_until_left(directory)
    placement = Placement(mesh, config.mesh.preset) if mesh.size > 1 else None
    resumes = latest_save(directory / "checkpoints") is not None
    rebuilds = bool(config.blockwise.steps) and not resumes
    with _host_memory() if rebuilds else contextlib.nullcontext():
        model, parameters = start_of(config, placement)
        teacher = None
        if config.train.needs_teacher and not config.teacher_cache:
            teacher = teacher_of(config, placement)
    _refuse_nonfinite(config.start, parameters)
    if teacher is not None:
        _refuse_nonfinite(config.teacher or config.start, teacher[1])
    size = model if isinstance(model, ModelConfig) else model.config
    beside = companions_of(config.start) if config.start else Beside()
    rows = training_rows(
        config.data, Path(config.directory) / "rows", progress, vocab_size=size.vocab_size,
        shard_index=jax.process_index(), shard_count=jax.process_count(),
    )  # fmt: skip
    share = batch_share(mesh, jax.process_index())
    if isinstance(model, Fitted):
        few = None if resumes else _calibration_batches(config, rows, progress)
        parameters = _with_scales(config, model, parameters, few, placement, progress)
    few = _rows_to_rebuild(config, rows) if rebuilds else None
    folder = RunFolder(
        directory=directory, config=config, model=model, program=program, rows=rows, beside=beside
    )
    with _written(folder) as (begin, files):
        if isinstance(model, Fitted) and few is not None:
            begin()
            parameters = _rebuilt(config, model, parameters, rows, few, progress, stop)
        if isinstance(model, Fitted) and not resumes:
            parameters = settled(parameters, model, program.held())
        parameters = add_adapters(parameters, size, config.lora, config.train.seed)
        trained = train(
            model, parameters, _batches(config, rows, *share), config.train, config.optimizer,
            mesh_config=config.mesh, options=config.options, teacher=teacher,
            directory=directory / "checkpoints", progress=progress, label=f"train {config.name}",
            stop=stop, lora=config.lora, listeners=(*files, *listeners), count_codes=True,
            begun=begin,
        )  # fmt: skip
        if is_first():
            folder.end(config.train.steps, trained)
            forget_layers(directory)
    return trained


def program_for(config: ExperimentConfig, mesh: Any) -> Program:
    """Returns the program that a config trains with on a mesh (of devices, or of sizes alone); reads nothing.

    Raises: InputError for a recipe, patterns, adapters, a batch, a chunk of the loss or a reconstruction that do not
        fit.
    """
    config.train.check_length(config.data.length)
    config.blockwise.check(config.recipe, mesh.size)
    return program_of(
        model_of(config), config.train, config.optimizer, mesh,
        mesh_config=config.mesh, options=config.options, lora=config.lora,
    )  # fmt: skip


@contextlib.contextmanager
def _written(folder: RunFolder) -> Iterator[tuple[Callable[[], None], list[Listener]]]:
    """Gives what to call when a run begins and who writes its reports to files; closes them however it ends.

    From its begin on the run is marked as running, and run.json says how it ended if it is not killed.
    """
    board = TensorBoard(folder.directory / "tensorboard")
    files: list[Listener] = [MetricsFile(folder.directory / "metrics.jsonl")]
    if folder.config.train.tensorboard:
        files.append(board)
    with contextlib.ExitStack() as open_now:
        open_now.callback(board.close)
        begun: list[bool] = []

        def begin() -> None:
            if is_first() and not begun:
                folder.begin()
                open_now.enter_context(marked_as_running(folder.directory))
                begun.append(True)

        try:
            yield begin, files
        except Stopped as stopped:
            if is_first():
                folder.end(stopped.step, None)
            raise
        except BaseException as error:
            if begun:
                folder.fail(error)
            raise


def _batches(config: ExperimentConfig, rows: Any, index: int, count: int) -> Any:
    """One process's share of every batch, with the teacher's kept words where the config names some."""
    from gemma_qat.data.loader import make_loader

    own = make_loader(
        rows, batch_size=config.train.batch_size // count, seed=config.train.seed,
        shard_index=index, shard_count=count, read_ahead=4,
    )  # fmt: skip
    if config.train.needs_teacher and config.teacher_cache:
        return CachedTeacher(own, Path(config.teacher_cache), rows)
    return own


def _rows_to_rebuild(config: ExperimentConfig, rows: Any) -> Iterable[Batch]:
    """The rows that layers are rebuilt on: those that training would begin with."""
    from gemma_qat.data.loader import make_loader

    if len(rows) < config.blockwise.rows:
        raise InputError(
            f"blockwise.rows={config.blockwise.rows}: the training text has {len(rows)} rows"
        )
    own = make_loader(rows, batch_size=config.blockwise.batch_size, seed=config.train.seed)
    return _shortened(own, 0)


def _rebuilt(
    config: ExperimentConfig,
    fitted: Fitted,
    parameters: Mapping[str, Any],
    rows: Any,
    batches: Iterable[Batch],
    progress: Progress | None,
    stop: Stop | None,
) -> Mapping[str, Any]:
    """Returns the parameters with every layer reconstructed; what is kept of it lies in the run's folder."""
    how = dataclasses.asdict(config.blockwise)
    made = {
        "blockwise": how, "tokens": config.blockwise.tokens(config.data.length), "recipe": shown(config.recipe),
        "scales": config.scales, "gradient": config.gradient, "dtype": config.options.dtype,
        "start": shown(config.start), "seed": config.train.seed, "text": rows.order(),
    }  # fmt: skip
    return reconstruct(
        fitted, parameters, batches, config.blockwise, seed=config.train.seed,
        options=config.options, kept=config.folder, made=made, progress=progress, stop=stop,
    )[0]  # fmt: skip


def _host_memory() -> contextlib.AbstractContextManager[Any]:
    """Keeps the arrays that are made inside in host memory, where jax knows the CPU beside its devices."""
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:
        return contextlib.nullcontext()


def _calibration_batches(
    config: ExperimentConfig, rows: Any, progress: Progress | None = None
) -> Iterable[Batch]:
    """Batches of the rows that are trained on, or of the part of the data that `calibration.split` names."""
    from gemma_qat.data.files import calibration_rows
    from gemma_qat.data.loader import make_loader

    split = config.calibration.split
    if split != "train":
        rows = calibration_rows(
            config.data, split, Path(config.directory) / "rows", progress,
            shard_index=jax.process_index(), shard_count=jax.process_count(),
        )  # fmt: skip
    few = min(config.calibration.batch_size, len(rows))
    own = make_loader(rows, batch_size=few, seed=config.train.seed)
    return _shortened(own, config.calibration.length)


def cache_teacher(
    config: ExperimentConfig,
    directory: Path,
    *,
    k: int,
    part: Part,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> Path:
    """Returns the folder of a part of the teacher's most likely words for every training row of `config`.

    Raises: InputError for a teacher of another vocabulary, a k or a part that does not exist, a folder of other rows.
    """
    from gemma_qat.data.files import training_rows

    config.train.check_length(config.data.length)
    placement = Placement(make_mesh(config.mesh), config.mesh.preset)
    teacher, parameters = teacher_of(config, placement)
    cache = Path(config.directory) / "rows"
    rows = training_rows(config.data, cache, progress, vocab_size=teacher.vocab_size)
    student = Student.of(teacher)
    return write_cache(
        directory, rows, student, student.stack(parameters), k=k, part=part, batch_size=batch_size,
        placement=placement, options=config.options,
        source=shown(config.teacher or config.start), chunk=config.train.loss_chunk, progress=progress,
    )  # fmt: skip


def quantize(config: ExperimentConfig, method: str, progress: Progress | None = None) -> Path:
    """Quantizes the start of `config` without training it and returns its run, of which it is save 0.

    `method` is a key of `ptq.METHODS`, `config.ptq` its options; what it needs of text, and static scales, are found on
    the rows that would be trained on.
    Raises: InputError for anything in the config that does not fit together, before anything is written.
    """
    from gemma_qat.data.files import training_rows

    directory = config.folder
    fitted = fit(size_named(config.model), config.recipe)
    as_float = dataclasses.replace(
        config,
        recipe="float",
        train=dataclasses.replace(config.train, loss="ce", hidden_weight=0.0),
    )
    _, parameters = start_of(as_float)
    _refuse_nonfinite(config.start, parameters)
    batches = None
    if wants_text(method, fitted, config.ptq):
        rows = training_rows(
            config.data, Path(config.directory) / "rows", progress,
            vocab_size=fitted.config.vocab_size,
        )  # fmt: skip
        batches = _calibration_batches(config, rows, progress)
    codes, floats = quantize_model(
        parameters, fitted, method, batches, config.calibration, config.options, progress,
        config=config.ptq,
    )  # fmt: skip
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(to_json(config), "utf-8")
    table = coverage(declare(fitted.config).values(), fitted.plans)
    write_json(directory / "coverage.json", [dataclasses.asdict(row) for row in table])
    beside = companions_of(config.start)
    save_packed(directory / "checkpoints" / "0", codes, floats, fitted, beside=beside)
    return directory


def _refuse_nonfinite(source: str, parameters: Mapping[str, Any]) -> None:
    """Refuses what a run begins from, or learns from, before it leaves anything on disk."""
    for path, leaf in parameters.items() if source else ():
        refuse_nonfinite(leaf, f"{source}: {path}")


def _shortened(batches: Iterable[Batch], length: int) -> Iterator[Batch]:
    """Yields the first `length` tokens of every row; 0 leaves rows whole."""
    for batch in batches:
        yield {
            name: batch[name][:, : length or None] for name in ("tokens", "positions", "segments")
        }


def _with_scales(
    config: ExperimentConfig,
    fitted: Fitted,
    parameters: Mapping[str, Any],
    batches: Iterable[Batch] | None,
    placement: Placement | None,
    progress: Progress | None,
) -> Mapping[str, Any]:
    if batches is None:  # A save holds every scale; only the shapes of a start are looked at.
        return fitted.adopt(parameters) | _placeholders(fitted)
    return with_scales(
        parameters,
        fitted,
        config.scale_init,
        batches,
        config.calibration,
        config.options,
        placement,
        progress,
    )


def _placeholders(fitted: Fitted) -> dict[str, Any]:
    abstract = abstract_parameters(fitted.config, fitted.plans)
    scales = [scale_path(path) for path, plan in fitted.plans.items() if plan.has_scale_leaf]
    return {path: jnp.ones(abstract[path].shape, abstract[path].dtype) for path in scales}
