"""A run without its numbers: model, optimizer, mesh, shardings, and the compiled step of every phase.

The loop, benchmarks and plans for machines that are not there all take their step from here, so what is measured and
planned is what runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import optax

from gemma_qat.errors import InputError
from gemma_qat.models import (
    Fitted,
    ModelConfig,
    RunOptions,
    abstract_parameters,
    merge_adapters,
)
from gemma_qat.sharding import MeshConfig, Placement, batch_parts
from gemma_qat.train.config import Phase, TrainConfig
from gemma_qat.train.distributed import spread
from gemma_qat.train.lora import LoraConfig, adapted_paths, adapter_shapes, trained_with
from gemma_qat.train.optimizer import OptimizerConfig, make_optimizer
from gemma_qat.train.selection import Selection, held_paths, select
from gemma_qat.train.state import Student, TrainState, start, state_shardings
from gemma_qat.train.step import Fixed, make_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """What is compiled, once for every phase; made by `program_of`."""

    student: Student
    teacher: Student | None
    config: TrainConfig
    options: RunOptions
    mesh: Any
    preset: str
    selection: Selection
    optimizer: optax.GradientTransformation
    leaves: Mapping[str, jax.ShapeDtypeStruct]
    """Shapes of all parameters, by in-memory path."""
    where: TrainState
    """Shardings of the state."""
    _steps: dict[Phase, Any] = dataclasses.field(default_factory=dict)

    def step(self, phase: Phase) -> Any:
        """Returns the jitted step (state, batch, fixed) -> (state, metrics) of a phase.

        Each phase is a program of its own, compiled when it begins; what does not happen costs nothing.
        """
        if phase not in self._steps:
            self._steps[phase] = make_step(
                self.student, self.optimizer, self.where, self.mesh, loss=self.config.loss,
                teacher=self.teacher, options=self._options(phase), chunk=self.config.loss_chunk,
                microbatches=self.config.microbatches, selection=self.selection,
                blend=(self.config.weights_from, self.config.blend_steps) if phase.blends else None,
                placement=Placement(self.mesh, self.preset),
                hidden_weight=self.config.hidden_weight, hidden=self.config.hidden,
            )  # fmt: skip
        return self._steps[phase]

    def _options(self, phase: Phase) -> RunOptions:
        return dataclasses.replace(self.options, quantize=phase.quantize)

    def abstract_state(self) -> TrainState:
        """Returns shape, dtype and sharding of every array of the state; allocates nothing."""
        shapes = jax.eval_shape(
            lambda tree: start(self.optimizer, tree, self.where, self.selection), dict(self.leaves)
        )
        return placed(shapes, self.where)

    def start(self, leaves: Mapping[str, Any]) -> TrainState:
        """Returns the state before the first step; the given arrays are copied, never donated."""
        return start(self.optimizer, leaves, self.where, self.selection)

    def merged(self, parameters: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Returns the parameters by checkpoint path, adapters added to their masters."""
        merged = merge_adapters(parameters, self.student.config, self.student.plans)
        return self.student.unstack(merged)

    def held(self) -> list[str]:
        """Returns the checkpoint paths of sites whose scales train while nothing moves their weights."""
        return held_paths(self.selection, self.leaves, self.student.config, self.student.plans)

    def adapted(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the masters that have adapters, in memory and placed, from parameters by checkpoint path."""
        names = adapted_paths(self.leaves, self.leaves)
        where = {path: self.where.parameters[path] for path in names}
        if not names:
            return {}
        leaves = self.student.stack(parameters)
        return spread({path: leaves[path] for path in names}, where)

    def ready_teacher(self, leaves: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the teacher's leaves as the step wants them; they lie as its shardings say."""
        assert self.teacher is not None
        return self._ready(self.teacher, leaves, self.options)

    def fixed(self, state: TrainState, teacher: Mapping[str, Any] | None, phase: Phase) -> Fixed:
        """Returns what no step of the phase changes: ready-made leaves that stay still, and the teacher's."""
        still = {path: state.parameters[path] for path in self.selection.still}
        return Fixed(teacher=teacher, still=self._ready(self.student, still, self._options(phase)))

    def _ready(
        self, who: Student, leaves: Mapping[str, Any], options: RunOptions
    ) -> dict[str, Any]:
        where = who.shardings(self.mesh, self.preset)
        return jax.jit(lambda tree: who.ready(tree, options, where))(dict(leaves)) if leaves else {}


def program_of(
    model: Fitted | ModelConfig,
    config: TrainConfig,
    optimizer_config: OptimizerConfig,
    mesh: Any,
    *,
    mesh_config: MeshConfig = MeshConfig(),
    options: RunOptions = RunOptions(),
    teacher: ModelConfig | None = None,
    lora: LoraConfig = LoraConfig(),
) -> Program:
    """Returns the program of a run on a mesh of devices; nothing is allocated.

    With adapters, what trains is them and learned scales, unless `config.only` says otherwise.
    Raises: InputError when the batch does not divide over the mesh, when a pattern of `config.only` matches nothing, or
        when it would train a master that has adapters.
    """
    rows = config.batch_size // config.microbatches
    if rows % batch_parts(mesh):
        raise InputError(
            f"train.batch_size={config.batch_size} in {config.microbatches} microbatches: rows of each a multiple of "
            f"{batch_parts(mesh)} expected, the parts into which the mesh splits a batch"
        )
    student = Student.of(model)
    factors = adapter_shapes(student.config, lora)
    shapes = abstract_parameters(student.config, student.plans)
    leaves = student.stack(shapes | factors)
    only = config.only or (trained_with(student.plans) if factors else ())
    selection = select(only, leaves, student.config, student.plans)
    for path in adapted_paths(selection.of(leaves), student.stack(factors)):
        raise InputError(
            f"train.only: {path} has adapters, so it stays as it is: train those instead"
        )
    optimizer = make_optimizer(optimizer_config, config.steps, selection.of(leaves), leaves)
    return Program(
        student=student, teacher=Student.of(teacher) if teacher else None, config=config,
        options=options, mesh=mesh, preset=mesh_config.preset, selection=selection,
        optimizer=optimizer, leaves=leaves,
        where=state_shardings(student, optimizer, leaves, mesh, mesh_config.preset, selection),
    )  # fmt: skip


def placed(shapes: Any, where: Any) -> Any:
    """Returns a tree of shapes that carry shardings."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        where,
    )
