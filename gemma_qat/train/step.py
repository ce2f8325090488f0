"""One training step, jitted over the mesh with explicit shardings in and out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gemma_qat.models import Gemma4, RunOptions
from gemma_qat.sharding import Placement, batch_sharding, replicated
from gemma_qat.train.losses import LOSSES, chunked, token_scores
from gemma_qat.train.state import Student, TrainState

Batch = dict[str, jax.Array]
"""tokens, segments, positions, targets int32 [B, T]; weights float32 [B, T]."""

Metrics = dict[str, jax.Array]


def batch_scores(
    leaves: dict[str, Any],
    batch: Batch,
    student: Student,
    teacher: Student | None,
    teacher_leaves: dict[str, Any] | None,
    options: RunOptions,
    chunk: int,
    placement: Placement | None = None,
) -> dict[str, jax.Array]:
    """Returns per-token scores [B, T] of a batch: the forward pass of training and of evaluation alike."""
    model = Gemma4(student.config, leaves, student.plans, options, placement)
    arrays = [_hidden(model, batch), batch["targets"]]
    if teacher is None or teacher_leaves is None:
        return chunked(lambda h, t: token_scores(model, h, t), arrays, chunk)
    reference = Gemma4(
        teacher.config, jax.lax.stop_gradient(teacher_leaves), teacher.plans, options, placement
    )
    arrays.append(_hidden(reference, batch))
    return chunked(lambda h, t, r: token_scores(model, h, t, reference, r), arrays, chunk)


def _hidden(model: Gemma4, batch: Batch) -> jax.Array:
    return model.hidden(batch["tokens"], batch["positions"], batch["segments"])[0]


def mean_over_targets(values: jax.Array, weights: jax.Array) -> jax.Array:
    """Returns the weighted mean of per-token values, float32 sums."""
    return jnp.sum(values * weights) / jnp.maximum(jnp.sum(weights), 1.0)


def make_step(
    student: Student,
    optimizer: optax.GradientTransformation,
    where: TrainState,
    mesh: Any,
    *,
    loss: str,
    teacher: Student | None = None,
    teacher_shardings: Any = None,
    options: RunOptions = RunOptions(),
    chunk: int = 0,
    placement: Placement | None = None,
) -> Callable[[TrainState, Batch, dict[str, Any] | None], tuple[TrainState, Metrics]]:
    """Returns the jitted step (state, batch, teacher leaves) -> (state, metrics); the state is donated.

    Units: metrics are means over targets, nats per token; grad_norm is global, before clipping.
    `placement` (that of `where`) says how activations lie on the mesh; without one the compiler decides.
    Raises: ValueError when the loss needs a teacher and there is none.
    """
    if loss == "kl" and teacher is None:
        raise ValueError("loss kl needs a teacher: give the float checkpoint to distil from")
    score = LOSSES[loss]

    def step(
        state: TrainState, batch: Batch, teacher_leaves: dict[str, Any] | None
    ) -> tuple[TrainState, Metrics]:
        def objective(leaves: dict[str, Any]) -> tuple[jax.Array, Metrics]:
            scores = batch_scores(
                leaves, batch, student, teacher, teacher_leaves, options, chunk, placement
            )
            means = {k: mean_over_targets(v, batch["weights"]) for k, v in scores.items()}
            return means[score], means

        (value, means), gradient = jax.value_and_grad(objective, has_aux=True)(state.parameters)
        updates, inner = optimizer.update(gradient, state.optimizer, state.parameters)
        parameters = optax.apply_updates(state.parameters, updates)
        metrics = means | {"loss": value, "grad_norm": optax.tree.norm(gradient)}
        return TrainState(state.step + 1, parameters, inner), metrics

    return jax.jit(
        step,
        in_shardings=(where, batch_sharding(mesh), teacher_shardings),
        out_shardings=(where, replicated(mesh)),
        donate_argnums=0,
    )
