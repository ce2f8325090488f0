"""The training loop: batches in, checkpoints and metrics out, and a resume that equals not stopping.

Everything that a later step depends on is in a save: parameters, optimizer state, step count, and the data iterator's
state. The loss and learning rate are functions of the step alone, so a run that is stopped after any save and started
again does the same arithmetic on the same batches, bit for bit on one mesh.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import numpy as np
import optax

from gemma_qat.errors import InputError, Stopped, unknown
from gemma_qat.models import Fitted, ModelConfig, RunOptions
from gemma_qat.sharding import MeshConfig, batch_parts, batch_sharding, make_mesh
from gemma_qat.train.distributed import global_batch, spread
from gemma_qat.train.losses import LOSSES
from gemma_qat.train.optimizer import OptimizerConfig, make_optimizer
from gemma_qat.train.record import Curve, Record
from gemma_qat.train.saves import Saves
from gemma_qat.train.signals import Stop
from gemma_qat.train.state import Student, TrainState, by_layer, start, state_shardings
from gemma_qat.train.step import make_step

Progress = Callable[[str, int, int], None]


@runtime_checkable
class Loader(Protocol):
    """Batches without end, with a state that can be saved.

    A batch holds this process's rows. Under "ids" it may name them; that stays on the host, for messages.
    """

    def __next__(self) -> Mapping[str, np.ndarray]: ...
    def get_state(self) -> Any: ...  # noqa: D102 (said above)
    def set_state(self, state: Any) -> None: ...  # noqa: D102


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, on what loss, and how often to look and to save.

    Units: steps count updates, batch_size rows over all devices; save_every 0 saves at the end only; of the saves the
    newest `keep` stay, and those at multiples of `keep_every` steps (0: none); loss_chunk is positions per chunk of the
    loss (0: all at once). Weights are rounded from step `weights_from` on, activations, keys
    and values from step `activations_from` (never before the weights); scales are those of the start until then.
    """

    steps: int = 1000
    batch_size: int = 8
    loss: str = "ce"
    seed: int = 0
    log_every: int = 20
    save_every: int = 0
    keep: int = 2
    keep_every: int = 0
    loss_chunk: int = 0
    weights_from: int = 0
    activations_from: int = 0

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise unknown("loss", self.loss, LOSSES)
        for name in ("steps", "batch_size", "log_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, at least 1 expected")
        if self.save_every < 0 or self.keep_every < 0:
            raise ValueError("save_every and keep_every are steps, at least 0 expected")
        if self.weights_from < 0 or self.activations_from < 0:
            raise ValueError("weights_from and activations_from are steps, at least 0 expected")

    def phase(self, step: int) -> Literal["all", "weights", "none"]:
        """Returns what is quantized in the update that follows `step` updates."""
        if step < self.weights_from:
            return "none"
        return "weights" if step < self.activations_from else "all"


@dataclasses.dataclass(frozen=True)
class Trained:
    """Parameters by checkpoint path and what was measured on the way."""

    parameters: dict[str, jax.Array]
    curves: dict[str, Curve]


def train(
    model: Fitted | ModelConfig,
    parameters: Mapping[str, Any],
    loader: Loader,
    config: TrainConfig,
    optimizer_config: OptimizerConfig,
    *,
    mesh_config: MeshConfig = MeshConfig(),
    options: RunOptions = RunOptions(),
    teacher: tuple[ModelConfig, Mapping[str, Any]] | None = None,
    directory: Path | None = None,
    progress: Progress | None = None,
    label: str = "train",
    stop: Stop | None = None,
) -> Trained:
    """Trains for `config.steps` steps and returns the parameters, resuming from `directory` if it holds a save.

    `parameters` (by checkpoint path) are where a fresh run starts; they are copied. `stop` is asked after every step.
    Raises: InputError when the loss turns to NaN, naming the step and its rows, when `directory` belongs to another
    model, holds a damaged save or cannot be written; Stopped when `stop` said so, after saving.
    """
    student, mesh = Student.of(model), make_mesh(mesh_config)
    if config.batch_size % batch_parts(mesh):
        raise InputError(
            f"train.batch_size={config.batch_size}: a multiple of {batch_parts(mesh)} expected, "
            "the parts into which the mesh splits a batch"
        )
    leaves = student.stack(parameters)
    optimizer = make_optimizer(optimizer_config, config.steps, leaves)
    where = state_shardings(student, optimizer, leaves, mesh, mesh_config.preset)
    guide = Student.of(teacher[0]) if teacher else None
    guide_leaves, guide_shardings = None, None
    if teacher and guide:
        guide_shardings = guide.shardings(mesh, mesh_config.preset)
        guide_leaves = spread(guide.stack(teacher[1]), guide_shardings)

    @functools.cache
    def step_of(phase: Literal["all", "weights", "none"]) -> Any:
        # Each phase is a program of its own, compiled when it begins; what does not happen costs nothing.
        return make_step(
            student, optimizer, where, mesh, loss=config.loss, teacher=guide,
            teacher_shardings=guide_shardings, chunk=config.loss_chunk,
            options=dataclasses.replace(options, quantize=phase),
        )  # fmt: skip

    record = Record(config.log_every, config.steps)
    saves: Saves | None = None
    if directory:
        abstract = abstract_state(optimizer, leaves, where)
        saves = Saves(directory, model, abstract, config.keep, config.keep_every)
    with saves or contextlib.nullcontext():
        if saves and saves.latest:
            state, number, data = saves.restore()
            loader.set_state(_from_jsonable(data["loader"]))
            record.restore(data)
        else:
            state, number = start(optimizer, spread(leaves, where.parameters), where), 0
        del leaves
        rows = batch_sharding(mesh)

        def update(state: TrainState, number: int, batch: Mapping[str, np.ndarray]) -> Any:
            return step_of(config.phase(number))(state, global_batch(batch, rows), guide_leaves)

        report = functools.partial(progress, label) if progress else None
        run = _Run(config, loader, update, record, saves, report, stop)
        state = run.go(state, number)
    return Trained(by_layer(state, student).parameters, record.curves)


@dataclasses.dataclass(frozen=True)
class _Run:
    """What happens between steps: batches in, metrics and saves out."""

    config: TrainConfig
    loader: Loader
    update: Callable[[TrainState, int, Mapping[str, np.ndarray]], Any]
    record: Record
    saves: Saves | None
    report: Callable[[int, int], None] | None
    stop: Stop | None

    def go(self, state: TrainState, number: int) -> TrainState:
        """Returns the state after the last step, `number` being done already; see `train` for what it raises."""
        steps = self.config.steps
        while number < steps:
            batch = dict(next(self.loader))
            ids = batch.pop("ids", None)
            state, metrics = self.update(state, number, batch)
            number += 1  # Counted here: asking the devices for the step would wait for them.
            if self.record.add(number, metrics, ids) and self.report:
                self.report(number, steps)
            stopping = self.stop is not None and self.stop(number)
            self._save(state, number, at_once=stopping)
            if stopping and number < steps:
                self._stopped(number)
        self.record.settle()
        if self.report:
            self.report(steps, steps)
        return state

    def _save(self, state: TrainState, number: int, at_once: bool) -> None:
        every = self.config.save_every
        due = number == self.config.steps or (every and number % every == 0)
        if self.saves is None:
            return
        self.saves.check()
        if due or at_once:
            self.record.settle()  # Raises if any loss up to here is not finite.
            data = {"loader": _jsonable(self.loader.get_state())}
            self.saves.save(state, number, data | self.record.state())

    def _stopped(self, number: int) -> None:
        self.record.settle()
        if self.saves is None:
            raise Stopped(f"stopped after step {number}")
        self.saves.finish()
        raise Stopped(
            f"stopped after step {number}, saved in {self.saves.directory / str(number)}; "
            "the same command goes on from there"
        )


def abstract_state(
    optimizer: optax.GradientTransformation, leaves: Mapping[str, Any], where: TrainState
) -> TrainState:
    """Returns shape, dtype and sharding of every array of the training state; allocates nothing."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(lambda tree: start(optimizer, tree, where), dict(leaves)),
        where,
    )


def _jsonable(state: Any) -> Any:
    return {"bytes": state.hex()} if isinstance(state, bytes) else state


def _from_jsonable(state: Any) -> Any:
    return (
        bytes.fromhex(state["bytes"])
        if isinstance(state, dict) and set(state) == {"bytes"}
        else state
    )
