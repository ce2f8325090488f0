"""The training loop: batches in, checkpoints and metrics out, and a resume that equals not stopping.

Everything that a later step depends on is in a save: parameters, optimizer state, step count, and the data iterator's
state. The loss and learning rate are functions of the step alone, so a run that is stopped after any save and started
again does the same arithmetic on the same batches, bit for bit on one mesh.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from gemma_qat.errors import Stopped
from gemma_qat.models import Fitted, ModelConfig, RunOptions
from gemma_qat.sharding import MeshConfig, batch_sharding, make_mesh
from gemma_qat.train.codes import CodeCounts, code_report_of
from gemma_qat.train.config import Phase, TrainConfig
from gemma_qat.train.distributed import global_batch, is_first, spread
from gemma_qat.train.lora import LoraConfig
from gemma_qat.train.metrics import Grids, GridWatch
from gemma_qat.train.optimizer import OptimizerConfig, schedule
from gemma_qat.train.points import Listener
from gemma_qat.train.program import Program, program_of
from gemma_qat.train.record import Curve, Record
from gemma_qat.train.saves import Saves
from gemma_qat.train.signals import Stop
from gemma_qat.train.speed import Speed
from gemma_qat.train.state import TrainState
from gemma_qat.train.step import EXPERT_SHARE, Fixed
from gemma_qat.train.telling import Telling

Progress = Callable[[str, int, int], None]


@runtime_checkable
class Loader(Protocol):
    """Batches without end, with a state that can be saved.

    A batch holds this process's rows. Under "ids" it may name them; that stays on the host, for messages.
    """

    def __next__(self) -> Mapping[str, np.ndarray]: ...
    def get_state(self) -> Any: ...  # noqa: D102 (said above)
    def set_state(self, state: Any) -> None: ...  # noqa: D102


@dataclasses.dataclass(frozen=True)
class Trained:
    """Parameters by checkpoint path and what was measured on the way.

    `codes`: the report of `codes.py` on those parameters, where it was asked for. `expert_share`: of the last step of
    this process, float32 [layers with experts, E].
    """

    parameters: dict[str, jax.Array]
    curves: dict[str, Curve]
    codes: dict[str, Any] | None = None
    expert_share: np.ndarray | None = None


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
    lora: LoraConfig = LoraConfig(),
    listeners: Sequence[Listener] = (),
    count_codes: bool = False,
    begun: Callable[[], None] = lambda: None,
) -> Trained:
    """Trains for `config.steps` steps and returns the parameters, resuming from `directory` if it holds a save.

    `parameters` (by checkpoint path, adapters included) are where a fresh run starts; they are copied. `stop` is asked
    after every step. Of every report, with the speed since the last, the `listeners` of the first process hear.
    `count_codes` (all processes alike) reports the use of codes at the end, and at every report where
    `config.tensorboard` says so. `begun` is called when nothing stands in the way of the first step.
    Raises: InputError when the loss turns to NaN, naming the step and its rows, when `directory` belongs to another
    model, holds a damaged save or cannot be written; Stopped when `stop` said so, after saving.
    """
    mesh = make_mesh(mesh_config)
    program = program_of(
        model, config, optimizer_config, mesh, mesh_config=mesh_config, options=options,
        teacher=teacher[0] if teacher else None, lora=lora,
    )  # fmt: skip
    guide = None
    if teacher and program.teacher:
        where = program.teacher.shardings(mesh, mesh_config.preset)
        guide = program.ready_teacher(spread(program.teacher.stack(teacher[1]), where))
    record = Record(config.log_every, config.steps)
    saves: Saves | None = None
    if directory:
        saves = Saves(directory, model, program, config.keep, config.keep_every)
    with saves or contextlib.nullcontext():
        if saves and saves.latest:
            state, number, data = saves.restore(program.adapted(parameters))
            loader.set_state(_from_jsonable(data["loader"]))
            record.restore(data)
        else:
            leaves = spread(program.student.stack(parameters), program.where.parameters)
            state, number = program.start(leaves), 0
            del leaves
        begun()
        report = functools.partial(progress, label) if progress else None
        rate = schedule(optimizer_config, optimizer_config.learning_rate, config.steps)
        telling = Telling(record, rate, listeners if is_first() else (), report)
        run = _Run(program, guide, loader, record, saves, stop, telling, count_codes)
        state = run.go(state, number)
    codes = None
    if count_codes and program.student.plans:
        codes = code_report_of(state.parameters, program.student, mesh)
    share = record.arrays.get(EXPERT_SHARE)
    return Trained(program.merged(state.parameters), record.curves, codes, share)


class _Run:
    """What happens between steps: batches in, metrics and saves out."""

    def __init__(
        self,
        program: Program,
        guide: Mapping[str, Any] | None,
        loader: Loader,
        record: Record,
        saves: Saves | None,
        stop: Stop | None,
        telling: Telling,
        count_codes: bool,
    ) -> None:
        self.program, self.config, self.guide = program, program.config, guide
        self.loader, self.record, self.saves = loader, record, saves
        self.stop, self.telling = stop, telling
        teacher = program.teacher.config if program.teacher else None
        self.speed = Speed(program.student.config, teacher, self.config.batch_size)
        self.watch = GridWatch(program.student) if self.config.watch_codes else None
        counts = count_codes and self.config.tensorboard and self.watch is not None
        self.counts = CodeCounts(program.student, program.mesh) if counts else None
        self.seen: Grids | None = None
        self.fixed: tuple[Phase, Fixed] | None = None
        self.rows = batch_sharding(program.mesh)

    def go(self, state: TrainState, number: int) -> TrainState:
        """Returns the state after the last step, `number` being done already; see `train` for what it raises."""
        steps = self.config.steps
        self._look(state)
        while number < steps:
            batch = dict(next(self.loader))
            ids = batch.pop("ids", None)
            state, metrics = self._update(state, number, batch)
            number += 1  # Counted here: asking the devices for the step would wait for them.
            self.speed.step(batch["tokens"].shape[1])
            stopping = self.stop is not None and self.stop(number)
            due = self._is_due(number)
            reports = number % self.config.log_every == 0 or number == steps
            if reports or due:
                metrics = metrics | self._look(state)
            if reports and self.counts is not None and self.seen is not None:
                self.telling.counted(number, self.counts.count(self.seen))
            self.record.add(number, metrics, ids)
            self._save(state, number, due or stopping)
            self.telling.tell(number, self.speed)
            if stopping and number < steps:
                self._stopped(number)
        self.record.settle()
        self.telling.tell(steps, self.speed)
        return state

    def _update(self, state: TrainState, number: int, batch: Mapping[str, np.ndarray]) -> Any:
        phase = self.config.phase(number)
        if self.fixed is None or self.fixed[0] != phase:
            self.fixed = (phase, self.program.fixed(state, self.guide, phase))
        step = self.program.step(phase)
        return step(state, global_batch(batch, self.rows), self.fixed[1])

    def _look(self, state: TrainState) -> dict[str, jax.Array]:
        """Returns how codes moved since the last look: at a report, at a save that was due, or when the run went on."""
        if self.watch is None:
            return {}
        self.seen, found = self.watch.look(state.parameters, self.seen)
        return found

    def _is_due(self, number: int) -> bool:
        every = self.config.save_every
        return number == self.config.steps or bool(every and number % every == 0)

    def _save(self, state: TrainState, number: int, saving: bool) -> None:
        if self.saves is None:
            return
        self.saves.check()
        if saving:
            self.record.settle()  # Raises if any loss up to here is not finite.
            data = {"loader": _jsonable(self.loader.get_state())}
            self.saves.save(state, number, data | self.record.state())

    def _stopped(self, number: int) -> None:
        self.record.settle()
        if self.saves is None:
            raise Stopped(f"stopped after step {number}", number)
        self.saves.finish()
        raise Stopped(
            f"stopped after step {number}, saved in {self.saves.directory / str(number)}; "
            "the same command goes on from there",
            number,
        )


def _jsonable(state: Any) -> Any:
    return {"bytes": state.hex()} if isinstance(state, bytes) else state


def _from_jsonable(state: Any) -> Any:
    return (
        bytes.fromhex(state["bytes"])
        if isinstance(state, dict) and set(state) == {"bytes"}
        else state
    )
