"""The optimizer: AdamW on weights, Adam in relative steps on learned scales.

A scale is a positive or negative number of any size, and Adam's step does not know: lr = 1e-4 would be a
hundredth of one tile's scale and all of another's. The step of a scale is therefore taken in units of the
scale itself (its update is multiplied by |scale|), which is Adam on its logarithm to first order. Adam's step is some
1 at most, so a scale keeps its sign as long as its learning rate is well below 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gemma_qat.errors import InputError, refuse_outside, unknown
from gemma_qat.quant.sites import SCALE_NAMES, scale_path


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with a warm-up and a decay, and a learning rate of their own for learned scales.

    Units: learning_rate per step; scale_learning_rate in relative change of the scale per step; warmup in steps;
    final_fraction of the peak rate at the last step; clip is the largest global norm of the gradient.
    """

    learning_rate: float = 3e-4
    scale_learning_rate: float = 1e-3
    warmup: int = 20
    decay: str = "cosine"
    final_fraction: float = 0.0
    b1: float = 0.9
    b2: float = 0.95
    weight_decay: float = 0.0
    clip: float = 1.0

    def __post_init__(self) -> None:
        if self.decay not in DECAYS:
            raise unknown("decay", self.decay, DECAYS)
        refuse_rates("optimizer", self.learning_rate, self.scale_learning_rate)
        for name in ("warmup", "final_fraction", "weight_decay"):
            refuse_outside(f"optimizer.{name}", getattr(self, name), 0)
        for name in ("b1", "b2"):
            refuse_outside(f"optimizer.{name}", getattr(self, name), 0, below=1)
        if not self.clip > 0:
            raise InputError(
                f"optimizer.clip={self.clip}: more than 0 expected, inf for no clipping"
            )


def refuse_rates(group: str, learning_rate: float, scale_learning_rate: float) -> None:
    """Refuses learning rates that go uphill, or a relative one with which a scale could change its sign.

    Raises: InputError.
    """
    refuse_outside(f"{group}.learning_rate", learning_rate, 0)
    refuse_outside(f"{group}.scale_learning_rate", scale_learning_rate, 0, below=1)


DECAYS = ("cosine", "linear", "constant")


def schedule(config: OptimizerConfig, peak: float, steps: int) -> optax.Schedule:
    """Returns the learning rate by step: linear warm-up to `peak`, then the decay."""
    after = max(1, steps - config.warmup)
    if config.decay == "cosine":
        decay = optax.cosine_decay_schedule(peak, after, config.final_fraction)
    elif config.decay == "linear":
        decay = optax.linear_schedule(peak, peak * config.final_fraction, after)
    else:
        decay = optax.constant_schedule(peak)
    if not config.warmup:
        return decay
    warm = optax.linear_schedule(peak / config.warmup, peak, config.warmup)
    return optax.join_schedules([warm, decay], [config.warmup])


def relative_steps() -> optax.GradientTransformation:
    """Returns the transformation that multiplies each update by the magnitude of its parameter."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return jax.tree.map(lambda u, p: u * jnp.abs(p), updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def make_optimizer(
    config: OptimizerConfig,
    steps: int,
    leaves: Mapping[str, Any],
    among: Iterable[str] = (),
) -> optax.GradientTransformation:
    """Returns the optimizer for these leaves; `_scale` beside a leaf is its scale, norms and scalars do not decay.

    `among`: paths of all leaves where these are some of them: a scale's master may be one that does not train.
    """
    learned = {scale_path(path, name) for path in {*leaves, *among} for name in SCALE_NAMES}
    labels = {path: "scale" if path in learned else "weight" for path in leaves}
    decays = {path: labels[path] == "weight" and leaf.ndim > 2 for path, leaf in leaves.items()}
    weights = optax.chain(
        optax.scale_by_adam(config.b1, config.b2),
        optax.add_decayed_weights(
            config.weight_decay, mask=lambda tree: {p: decays[p] for p in tree}
        ),
        optax.scale_by_learning_rate(schedule(config, config.learning_rate, steps)),
    )
    scales = optax.chain(
        optax.scale_by_adam(config.b1, config.b2),
        relative_steps(),
        optax.scale_by_learning_rate(schedule(config, config.scale_learning_rate, steps)),
    )
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.partition({"weight": weights, "scale": scales}, labels),
    )
