"""The training state: what a step changes, what a checkpoint holds.

Parameters are a flat dict by in-memory path; the optimizer state contains dicts with the same keys. Both lie
on the mesh as the rule table says, and both are saved one layer at a time (`by_layer`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gemma_qat.models import (
    Fitted,
    ModelConfig,
    RunOptions,
    leaf_shardings,
    ready,
    stack_layers,
    unstack_layers,
)
from gemma_qat.quant import Plans
from gemma_qat.sharding import like_parameters, replicated
from gemma_qat.train.selection import EVERYTHING, Selection


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Step count, parameters by in-memory path, optimizer state."""

    step: Any
    parameters: dict[str, Any]
    optimizer: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Student:
    """The model being trained: its config and plans (none for a float model)."""

    config: ModelConfig
    plans: Plans

    @classmethod
    def of(cls, model: Fitted | ModelConfig) -> Student:
        """Returns the student of a fitted recipe, or of a config to be trained in float."""
        if isinstance(model, ModelConfig):
            return cls(config=model, plans={})
        return cls(config=model.config, plans=model.plans)

    def stack(self, by_layer: Mapping[str, Any]) -> dict[str, Any]:
        """Returns leaves by layer as in-memory leaves."""
        return stack_layers(by_layer, self.config, self.plans)

    def unstack(self, leaves: Mapping[str, Any]) -> dict[str, Any]:
        """Returns in-memory leaves by layer."""
        return unstack_layers(leaves, self.config, self.plans)

    def ready(
        self, leaves: Mapping[str, Any], options: RunOptions, where: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Returns in-memory leaves as layers want them: rounded, in the dtype of activations, lying as `where` says."""
        return ready(leaves, self.config, self.plans, options, where)

    def shardings(self, mesh: Any, preset: str) -> dict[str, Any]:
        """Returns where each in-memory leaf lies."""
        return leaf_shardings(self.config, self.plans, mesh, preset)


def state_shardings(
    student: Student,
    optimizer: optax.GradientTransformation,
    leaves: Any,
    mesh: Any,
    preset: str,
    selection: Selection = EVERYTHING,
) -> TrainState:
    """Returns the sharding of every array of the training state; allocates nothing.

    What no declaration knows (low-rank factors) is on every device.
    """
    by_path = dict.fromkeys(leaves, replicated(mesh)) | student.shardings(mesh, preset)
    abstract = jax.eval_shape(lambda tree: optimizer.init(selection.of(tree)), leaves)
    return TrainState(
        step=replicated(mesh),
        parameters={path: by_path[path] for path in leaves},
        optimizer=like_parameters(abstract, by_path, mesh),
    )


def start(
    optimizer: optax.GradientTransformation,
    leaves: Mapping[str, Any],
    where: TrainState,
    selection: Selection = EVERYTHING,
) -> TrainState:
    """Returns the state before the first step, placed as `where` says; the given arrays are copied, never donated."""

    def make(parameters: dict[str, Any]) -> TrainState:
        copies = jax.tree.map(jnp.array, parameters)
        return TrainState(jnp.zeros((), jnp.int32), copies, optimizer.init(selection.of(copies)))

    return jax.jit(make, out_shardings=where)(dict(leaves))


def by_layer(state: TrainState, student: Student) -> TrainState:
    """Returns the state with every dict of leaves cut into single layers: the form that is saved."""
    return _convert(state, lambda leaves: student.unstack(leaves))


def by_group(state: TrainState, student: Student) -> TrainState:
    """Returns a saved state in its in-memory form."""
    return _convert(state, lambda leaves: student.stack(leaves))


def _convert(state: TrainState, change: Callable[[dict[str, Any]], dict[str, Any]]) -> TrainState:
    def is_leaves(node: Any) -> bool:
        # Optax has dicts of its own (of the parts of a partition), with names that are no paths.
        return isinstance(node, dict) and any("/" in str(key) for key in node)

    return jax.tree.map(
        lambda node: change(node) if is_leaves(node) else node, state, is_leaf=is_leaves
    )
