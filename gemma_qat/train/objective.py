"""The loss of final hidden states, over chunks of positions, with its gradient made on the way forward.

With 262,144 words the logits of a batch are larger than the model, so [B, T, V] is never held. A chunk's logits are
made, scored, turned into their own gradient (closed forms, `losses.py`) and multiplied back at once:

    per chunk    logits = head(h)     scores, g = score(logits, targets, teacher)     dh, dhead = pull(g * weight)

The backward pass then only multiplies what the forward pass made by the cotangent of the sum. Against recomputing each
chunk when it is differentiated, this saves one of three products with the head, and the teacher's second one.

The head's leaves are ready-made ones (`models/ahead.py`), so the table is rounded once, not once a chunk.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gemma_qat.models import ModelConfig, RunOptions
from gemma_qat.models.gemma4 import head_logits
from gemma_qat.quant.plan import Plan
from gemma_qat.quant.rounded import Rounded
from gemma_qat.sharding import Placement
from gemma_qat.train.losses import LOSSES, chunks


@dataclasses.dataclass(frozen=True)
class Head:
    """How hidden states become logits: all of a model that its leaves are not."""

    config: ModelConfig
    plans: tuple[tuple[str, Plan], ...]
    options: RunOptions
    placement: Placement | None = None

    def logits(self, leaves: dict[str, Any], hidden: jax.Array) -> jax.Array:
        """Returns soft-capped logits [B, T, V], float32."""
        return head_logits(
            self.config, leaves, dict(self.plans), hidden, self.options, self.placement
        )


@dataclasses.dataclass(frozen=True)
class HeadLoss:
    """What is computed from hidden states: the student's head, the teacher's, the loss, positions a chunk (0: all)."""

    student: Head
    teacher: Head | None
    loss: str
    chunk: int


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def head_loss(
    how: HeadLoss,
    values: dict[str, jax.Array],
    hidden: Float[Array, "B T D"],
    rest: dict[str, Any],
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns (sum over targets of the loss, sums of every score), float32.

    `values`: the head's leaves, ready-made, without codes. `rest`: targets int32 and weights float32 [B, T]; `codes` of
    the head for integer dots; of a teacher either `teacher` (its head's leaves) with `teacher_hidden` [B, T, D], or
    `topk` (ids, log probabilities).
    Raises: ValueError when the chunk does not divide the positions.
    """

    def one(_: None, parts: dict[str, Any]) -> tuple[None, dict[str, jax.Array]]:
        logits = how.student.logits(_rounded(values, rest["codes"]), parts["hidden"])
        return None, _sums(_scored(how, logits, parts, rest)[0], parts["weights"])

    _, sums = jax.lax.scan(one, None, _split(hidden, rest, how.chunk))
    return _total(how, sums)


def _forward(how: HeadLoss, values: dict[str, jax.Array], hidden: jax.Array, rest: dict[str, Any]):
    def one(total: dict[str, jax.Array], parts: dict[str, Any]):
        def logits_of(values: dict[str, jax.Array], hidden: jax.Array) -> jax.Array:
            return how.student.logits(_rounded(values, rest["codes"]), hidden)

        logits, pull = jax.vjp(logits_of, values, parts["hidden"])
        scores, gradient = _scored(how, logits, parts, rest)
        d_values, d_hidden = pull(gradient * parts["weights"][..., None])
        total = jax.tree.map(lambda t, d: t + d.astype(jnp.float32), total, d_values)
        return total, (d_hidden, _sums(scores, parts["weights"]))

    zeros = jax.tree.map(lambda v: jnp.zeros(v.shape, jnp.float32), values)
    d_values, (d_hidden, sums) = jax.lax.scan(one, zeros, _split(hidden, rest, how.chunk))
    d_hidden = jnp.moveaxis(d_hidden, 0, 1).reshape(hidden.shape)
    d_values = jax.tree.map(lambda d, v: d.astype(v.dtype), d_values, values)
    return _total(how, sums), (d_values, d_hidden)


def _backward(how: HeadLoss, residuals, cotangents):
    del how
    scale, _ = cotangents
    return (*jax.tree.map(lambda d: (d * scale).astype(d.dtype), residuals), None)


head_loss.defvjp(_forward, _backward)


def _rounded(values: dict[str, jax.Array], codes: dict[str, Any]) -> dict[str, Any]:
    return values | {path: Rounded(values[path], q) for path, q in codes.items()}


def _split(hidden: jax.Array, rest: dict[str, Any], chunk: int) -> dict[str, Any]:
    names = ("targets", "weights", "teacher_hidden", "topk")
    arrays = {"hidden": hidden} | {name: rest[name] for name in names if name in rest}
    return jax.tree.map(lambda x: chunks(x, chunk), arrays)


def _scored(how: HeadLoss, logits: jax.Array, parts: dict[str, Any], rest: dict[str, Any]) -> Any:
    teacher = parts.get("topk")
    if how.teacher is not None:
        teacher = how.teacher.logits(rest["teacher"], parts["teacher_hidden"])
    return LOSSES[how.loss].score(logits, parts["targets"], teacher)


def _sums(scores: dict[str, jax.Array], weights: jax.Array) -> dict[str, jax.Array]:
    return {name: jnp.sum(score * weights) for name, score in scores.items()}


def _total(how: HeadLoss, sums: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
    added = {name: jnp.sum(parts) for name, parts in sums.items()}
    return added[LOSSES[how.loss].averaged], added
