"""One training step, jitted over the mesh with explicit shardings in and out.

    masters --made ready once--> weights in the dtype of activations          (`models/ahead.py`)
    for every microbatch:   hidden states of student and teacher --> head_loss --> gradient of the ready weights
    sum of gradients, float32 --straight through--> gradient of masters and scales --> optimizer

Weights are rounded where their shards lie, before anything is gathered, once a step however many microbatches and
rematerialized layers there are. Leaves that cannot change come in ready and are not rounded at all.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gemma_qat.models import Gemma4, RunOptions, as_leaves, narrow, round_ahead
from gemma_qat.models.ahead import placed
from gemma_qat.models.gemma4 import head_name
from gemma_qat.nn.taps import Loads, Residuals
from gemma_qat.quant.rounded import Rounded
from gemma_qat.sharding import Placement, batch_sharding, replicated
from gemma_qat.train.hidden import Which, error_of_layers, relative_error
from gemma_qat.train.losses import LOSSES
from gemma_qat.train.objective import Head, HeadLoss, head_loss
from gemma_qat.train.selection import EVERYTHING, Selection, held_sites
from gemma_qat.train.state import Student, TrainState

Batch = dict[str, jax.Array]
"""tokens, segments, positions, targets int32 [B, T]; weights float32 [B, T]; of a cached teacher also topk_ids int32
and topk_logprobs float32 [B, T, k]."""

Metrics = dict[str, jax.Array]

EXPERT_TOKENS = "expert_tokens"
"""Sum over microbatches, float32 [layers, E]: how many tokens chose each expert."""

EXPERT_SHARE = "expert_share"
"""Metric, float32 [layers, E]: the share of choices that fell on each expert, layers with experts in order."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Fixed:
    """Ready-made leaves by in-memory path that no step changes: the teacher's, and the student's that stay still."""

    teacher: Any = None
    still: Any = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """What is minimized: a loss of a student's hidden states, beside a teacher's.

    `hidden_weight` times the relative error of the states `hidden` names is added to it.
    """

    student: Student
    teacher: Student | None
    loss: str
    options: RunOptions
    chunk: int
    placement: Placement | None = None
    hidden_weight: float = 0.0
    hidden: Which = "layers"

    def sums(
        self, leaves: Mapping[str, Any], batch: Batch, teacher_leaves: Mapping[str, Any] | None
    ) -> tuple[jax.Array, Metrics]:
        """Returns (sum of the loss over targets, sums of every score) of ready-made leaves.

        Raises: ValueError when the loss needs a teacher and there is none.
        """
        rest: dict[str, Any] = {"targets": batch["targets"], "weights": batch["weights"]}
        by_layer = self.hidden_weight > 0 and self.hidden == "layers"
        seen: Loads | None = Residuals() if by_layer else None
        if self.teacher is not None and teacher_leaves is not None:
            guide = jax.lax.stop_gradient(teacher_leaves)
            rest["teacher"] = _head_leaves(self.teacher, guide)
            rest["teacher_hidden"] = self._hidden(self.teacher, guide, batch, seen)
        elif self.hidden_weight:
            raise ValueError("hidden states need the teacher itself: give the float checkpoint")
        elif "topk_ids" in batch:
            rest["topk"] = (batch["topk_ids"], batch["topk_logprobs"])
        elif LOSSES[self.loss].has_teacher:
            raise ValueError(
                f"loss {self.loss} needs a teacher: give the float checkpoint to distil from"
            )
        loads = Residuals() if by_layer else Loads()
        hidden = self._hidden(self.student, leaves, batch, loads)
        values, codes = _taken_apart(_head_leaves(self.student, leaves))
        loss, scores = head_loss(self._head_loss(), values, hidden, rest | {"codes": codes})
        if self.hidden_weight:
            last = relative_error(hidden, rest["teacher_hidden"])
            error = last if seen is None else error_of_layers(loads, seen)
            scores = scores | {"hidden": jnp.sum(error * batch["weights"])}
            loss = loss + self.hidden_weight * scores["hidden"]
        chosen = [name for name in loads if name.endswith("router/tokens")]
        if chosen:
            in_order = sorted(
                chosen, key=lambda name: int(name.split("/")[1])
            )  # layers/3/router/tokens
            counts = [loads[name].astype(jnp.float32) for name in in_order]
            scores = scores | {EXPERT_TOKENS: jnp.stack(counts)}
        return loss, scores

    def holding(self, held: Collection[str]) -> Objective:
        """Returns the same of a student whose tables that are only looked up may be among those that are `held`."""
        plans = {
            path: dataclasses.replace(plan, gradient="held") if path in held else plan
            for path, plan in self.student.plans.items()
        }
        return dataclasses.replace(self, student=dataclasses.replace(self.student, plans=plans))

    def _head_loss(self) -> HeadLoss:
        heads = [
            None
            if who is None
            else Head(who.config, tuple(sorted(who.plans.items())), self.options, self.placement)
            for who in (self.student, self.teacher)
        ]
        assert heads[0] is not None
        return HeadLoss(heads[0], heads[1], self.loss, self.chunk)

    def _hidden(
        self, who: Student, leaves: Mapping[str, Any], batch: Batch, loads: Loads | None = None
    ) -> jax.Array:
        model = Gemma4(who.config, leaves, who.plans, self.options, self.placement)
        return model.hidden(batch["tokens"], batch["positions"], batch["segments"], taps=loads)[0]


def _head_leaves(who: Student, leaves: Mapping[str, Any]) -> dict[str, Any]:
    prefix = f"{head_name(who.config)}/"
    return {path: leaf for path, leaf in leaves.items() if path.startswith(prefix)}


def _taken_apart(leaves: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values that are differentiated, and codes (or None) of those that lie on a grid."""
    rounded = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, Rounded)}
    values = {path: leaf.value for path, leaf in rounded.items()}
    codes = {path: leaf.codes for path, leaf in rounded.items()}
    return {**leaves, **values}, codes


def gradients(
    objective: Objective,
    selection: Selection,
    parameters: Mapping[str, jax.Array],
    batch: Batch,
    fixed: Fixed,
    microbatches: int = 1,
    where: Mapping[str, Any] | None = None,
    strength: jax.Array | None = None,
) -> tuple[dict[str, jax.Array], Metrics, dict[str, Any]]:
    """Returns (gradient of the mean loss by trained leaf, means of every score over targets, codes of this step).

    `strength`: how far weights are on their way to the grid, all of it unless given (`models/ahead.py`).

    `where`: shardings of parameters by path, which what is made ready and the gradients lie by too.
    Units: nats per token; `tokens` is the number of targets; `expert_load` the busiest expert's tokens over the mean
    of all experts, averaged over layers.
    """
    held_still = held_sites(selection, parameters)
    student, options = objective.student, objective.options
    objective = objective.holding(held_still)
    trained = selection.of(parameters)
    held = {p: x for p, x in parameters.items() if p not in trained and p not in selection.still}

    def make_ready(trained: dict[str, jax.Array]) -> Any:
        leaves = {**held, **trained}
        return round_ahead(leaves, student.config, student.plans, options, strength, held_still)

    place = functools.partial(placed, where=where)
    wide, pull, codes = jax.vjp(make_ready, trained, has_aux=True)
    values = place(narrow(wide, student.config, student.plans, options))

    def sums(values: dict[str, jax.Array], part: Batch) -> tuple[jax.Array, Metrics]:
        leaves = as_leaves(values, codes, student.config, student.plans, options)
        return objective.sums({**leaves, **fixed.still}, part, fixed.teacher)

    gradient, totals = _accumulated(sums, values, batch, microbatches, place)
    tokens = jnp.sum(batch["weights"])
    count = jnp.maximum(tokens, 1.0)
    (gradient,) = pull(
        {path: gradient[path].astype(leaf.dtype) / count for path, leaf in wide.items()}
    )
    loads = totals.pop(EXPERT_TOKENS, None)
    means = {name: total / count for name, total in totals.items()}
    if loads is not None:
        means["expert_load"] = jnp.mean(jnp.max(loads, axis=1) / jnp.mean(loads, axis=1))
        means[EXPERT_SHARE] = loads / jnp.sum(loads, axis=1, keepdims=True)
    return place(selection.masked(gradient)), means | {"tokens": tokens}, codes


def _accumulated(
    sums: Callable[[dict[str, jax.Array], Batch], tuple[jax.Array, Metrics]],
    values: dict[str, jax.Array],
    batch: Batch,
    microbatches: int,
    place: Callable[[dict[str, jax.Array]], dict[str, jax.Array]],
) -> tuple[dict[str, jax.Array], Metrics]:
    """Returns the gradient and the scores summed over microbatches, in float32 where there are several."""
    differentiate = jax.grad(sums, has_aux=True)
    if microbatches == 1:
        return differentiate(values, batch)

    def one(total: Any, part: Batch) -> tuple[Any, None]:
        gradient, scores = differentiate(values, part)
        added = jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, (gradient, scores))
        return (place(added[0]), added[1]), None

    parts = {name: _split_rows(x, microbatches) for name, x in batch.items()}
    shapes = jax.eval_shape(differentiate, values, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), shapes)
    return jax.lax.scan(one, (place(zeros[0]), zeros[1]), parts)[0]


def _split_rows(x: jax.Array, parts: int) -> jax.Array:
    """Returns [B, ...] as [parts, B / parts, ...], every part taking rows from every shard of the batch."""
    if x.shape[0] % parts:
        raise ValueError(f"{parts} microbatches do not divide a batch of {x.shape[0]} rows")
    return jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)


SCHEDULES = {"cpu": {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}}
"""Compiler options by platform. XLA on CPU orders a program for concurrency unless told otherwise: what the backward
pass recomputes is then made, and held, during the forward one. The order changes no number."""


def make_step(
    student: Student,
    optimizer: optax.GradientTransformation,
    where: TrainState,
    mesh: Any,
    *,
    loss: str,
    teacher: Student | None = None,
    options: RunOptions = RunOptions(),
    chunk: int = 0,
    microbatches: int = 1,
    selection: Selection = EVERYTHING,
    blend: tuple[int, int] | None = None,
    placement: Placement | None = None,
    hidden_weight: float = 0.0,
    hidden: Which = "layers",
) -> Any:
    """Returns the jitted step (state, batch, fixed) -> (state, metrics); the state is donated.

    `blend` (first, length): weights move to the grid over `length` steps from step `first` on, in equal parts.
    `placement` (that of `where`) says how activations lie on the mesh; without one the compiler decides.
    Units: metrics are means over targets, nats per token; grad_norm is global, before clipping.
    Raises: when it is traced, ValueError when the loss needs a teacher and there is none, or when the microbatches do
        not divide the rows.
    """
    objective = Objective(
        student=student, teacher=teacher, loss=loss, options=options, chunk=chunk,
        placement=placement, hidden_weight=hidden_weight, hidden=hidden,
    )  # fmt: skip

    def step(state: TrainState, batch: Batch, fixed: Fixed | None) -> tuple[TrainState, Metrics]:
        strength = None if blend is None else (state.step - blend[0] + 1) / blend[1]
        gradient, means, _ = gradients(
            objective, selection, state.parameters, batch, fixed or Fixed(), microbatches,
            where.parameters, strength,
        )  # fmt: skip
        trained = selection.of(state.parameters)
        updates, inner = optimizer.update(gradient, state.optimizer, trained)
        moved = optax.apply_updates(trained, selection.masked(updates))
        minimized = means[LOSSES[loss].averaged]
        if hidden_weight:
            minimized = minimized + hidden_weight * means["hidden"]
        metrics = means | {
            "loss": minimized,
            "grad_norm": optax.tree.norm(gradient),
        }
        return TrainState(state.step + 1, state.parameters | moved, inner), metrics

    return jax.jit(
        step,
        in_shardings=(where, batch_sharding(mesh), None),
        out_shardings=(where, replicated(mesh)),
        donate_argnums=0,
        compiler_options=SCHEDULES.get(mesh.devices.flat[0].platform),
    )
