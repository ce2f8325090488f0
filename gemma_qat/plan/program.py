"""The real training step, abstractly: what `train` would run, as shapes that say where they lie; nothing allocated."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gemma_qat.models import Fitted, ModelConfig, RunOptions, abstract_parameters
from gemma_qat.sharding import MeshConfig, batch_sharding
from gemma_qat.train import OptimizerConfig, Program, TrainConfig, program_of
from gemma_qat.train.lora import LoraConfig
from gemma_qat.train.program import placed
from gemma_qat.train.state import TrainState
from gemma_qat.train.step import Fixed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """One training step to be planned.

    `teacher` is the float model distilled from, held in `teacher_dtype`; None where the loss needs none.
    Units: length in tokens per row.
    """

    name: str
    model: Fitted | ModelConfig
    length: int
    teacher: ModelConfig | None = None
    teacher_dtype: str = "bfloat16"
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    options: RunOptions = RunOptions()
    lora: LoraConfig = LoraConfig()

    def __post_init__(self) -> None:
        self.train.check_length(self.length)

    @property
    def config(self) -> ModelConfig:
        """The model's numbers."""
        return self.model if isinstance(self.model, ModelConfig) else self.model.config

    @property
    def recipe(self) -> str:
        """The recipe's name, or float."""
        return "float" if isinstance(self.model, ModelConfig) else self.model.recipe

    @property
    def tokens(self) -> int:
        """Tokens of one step, over all devices."""
        return self.train.batch_size * self.length


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What one step is called with, as shapes that carry their shardings."""

    state: TrainState
    batch: dict[str, Any]
    fixed: Fixed


def program(workload: Workload, mesh: Any) -> Program:
    """Returns the program that `train` would run on a mesh (of devices, or of sizes alone)."""
    return program_of(
        workload.model, workload.train, workload.optimizer, mesh, mesh_config=workload.mesh,
        options=workload.options, teacher=workload.teacher, lora=workload.lora,
    )  # fmt: skip


def arguments(workload: Workload, mesh: Any) -> Arguments:
    """Returns the abstract arguments of the step on a mesh (of devices, or of sizes alone)."""
    whole = program(workload, mesh)
    fixed = Fixed()
    if whole.teacher is not None:
        guide = whole.teacher
        wide = guide.stack(abstract_parameters(guide.config, {}, workload.teacher_dtype))
        where = guide.shardings(mesh, workload.mesh.preset)
        fixed = Fixed(teacher=placed(wide, {path: where[path] for path in wide}))
    return Arguments(whole.abstract_state(), _batch(workload, mesh), fixed)


def _batch(workload: Workload, mesh: Any) -> dict[str, Any]:
    shape = (workload.train.batch_size, workload.length)
    kinds = dict.fromkeys(("tokens", "segments", "positions", "targets"), jnp.int32)
    where = batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct(shape, kind, sharding=where)
        for name, kind in (kinds | {"weights": jnp.float32}).items()
    }


def lower(workload: Workload, mesh: Any) -> Any:
    """Returns the step of `train/step.py`, lowered for a mesh of devices, ready to be compiled for them."""
    given = arguments(workload, mesh)
    step = program(workload, mesh).step(workload.train.phase(workload.train.steps))
    return step.lower(given.state, given.batch, given.fixed)


def device_bytes(tree: Any) -> int:
    """Returns the bytes of a tree of placed shapes on one device."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        elements = 1
        for n in leaf.sharding.shard_shape(leaf.shape):
            elements *= n
        total += elements * leaf.dtype.itemsize
    return total


def by_part(given: Arguments) -> Mapping[str, int]:
    """Returns the bytes on one device of each thing a step is given."""
    return {
        "parameters": device_bytes(given.state.parameters),
        "optimizer": device_bytes(given.state.optimizer),
        "teacher": device_bytes(given.fixed.teacher),
        "batch": device_bytes(given.batch),
    }
