"""Block-wise reconstruction: one decoder layer after another learns to undo what rounding did to it.

    float stream         text -> layer 0 -> layer 1 -> ...          the model as it was given, never rounded
                                    |          |
                                  target     target
                                    |          |
    quantized stream     text -> layer 0*-> layer 1*-> ...          each layer trained in its turn, then run once

Layer i trains everything it has (weights through the rounding, norms, learned scales), on inputs from the quantized
layers before it, towards what the float layer says to float inputs. So it makes good its own rounding, and as much as
it can of what those before it left. The error is relative: squared error over the target's squares, padding left out,
so that 1 is a layer that says nothing and errors of layers compare.

Both streams wait in host memory between layers. On the device are one layer's weights, their gradients and optimizer
state, and one batch's activations, so that one device is enough whatever the number of layers. Equal layers share a
compiled step. Tables and head lie outside of the layers: they are rounded with the scales they began with, which the
run that follows trains on (`train.only=("*_scale",)` trains scales alone).

Source: Block-AP of EfficientQAT (arXiv 2407.11062, OpenGVLab/EfficientQAT `quantize/block_ap.py`): target and input as
there, Adam without warm-up, a cosine to a twentieth of the rate, batches that keep their rows. There the error is
absolute, zero points train too, and tables stay in float.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from gemma_qat.errors import InputError, Stopped, refuse_outside
from gemma_qat.models import Fitted, Flow, Layerwise, RunOptions, run_block
from gemma_qat.nn.shapes import LayerShape
from gemma_qat.ptq import Batch
from gemma_qat.quant.plan import Plan
from gemma_qat.train.optimizer import OptimizerConfig, make_optimizer, refuse_rates
from gemma_qat.train.rebuilt import Rebuilt, RebuiltLayers
from gemma_qat.train.signals import Stop

Progress = Callable[[str, int, int], None]

FINAL = 0.05
"""Of the learning rate, what is left at a layer's last step."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockwiseConfig:
    """Reconstruction of one layer after another, before the run's own steps.

    Units: steps count updates of each layer (0: no reconstruction); rows are taken from the training text once and used
    by all layers, batch_size of them a step; learning_rate per step, scale_learning_rate in relative change per step.
    A layer sees steps * batch_size / rows epochs. The rates were chosen at w2 on a tiny twin's
    validation text; EfficientQAT takes 1e-5 to 2e-5 for weights of 7B and more.
    """

    steps: int = 0
    rows: int = 128
    batch_size: int = 8
    learning_rate: float = 1e-3
    scale_learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        for name, least in (("steps", 0), ("rows", 1), ("batch_size", 1)):
            refuse_outside(f"blockwise.{name}", getattr(self, name), least)
        refuse_rates("blockwise", self.learning_rate, self.scale_learning_rate)

    def check(self, recipe: str, devices: int) -> None:
        """Refuses what cannot be reconstructed; nothing where there are no steps.

        Raises: InputError.
        """
        if not self.steps:
            return
        given = f"blockwise.steps={self.steps}"
        if recipe == "float":
            raise InputError(
                f"{given} with recipe=float: layers are rebuilt on a recipe's grid, give one"
            )
        if devices > 1:
            raise InputError(
                f"{given} on {devices} devices: one layer at a time fits one device, run it where one is visible; its "
                "run may be the start of one on a mesh"
            )
        if self.rows % self.batch_size:
            raise InputError(
                f"blockwise.rows={self.rows}: a multiple of blockwise.batch_size={self.batch_size} expected"
            )

    def tokens(self, length: int) -> dict[str, int]:
        """Returns the tokens of rows of `length` that each layer ran forward on (`read`) and trained on (`trained`)."""
        return {
            "read": self.rows * length,
            "trained": self.steps * self.batch_size * length,
        }

    @property
    def optimizer(self) -> OptimizerConfig:
        """How a layer's leaves move."""
        return OptimizerConfig(
            learning_rate=self.learning_rate, scale_learning_rate=self.scale_learning_rate,
            warmup=0, decay="cosine", final_fraction=FINAL,
        )  # fmt: skip


def reconstruct(
    fitted: Fitted,
    parameters: Mapping[str, Any],
    batches: Iterable[Batch],
    config: BlockwiseConfig,
    *,
    seed: int = 0,
    options: RunOptions = RunOptions(),
    kept: Path | None = None,
    made: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    stop: Stop | None = None,
) -> tuple[dict[str, Any], list[Rebuilt]]:
    """Returns (parameters with every layer reconstructed, in host memory; error before and after, by layer).

    `parameters` (by checkpoint path, with every scale) are the float model and where the quantized one begins. Of
    `batches` the first `rows / batch_size` are read. In the folder `kept` layers that are done wait for the next start,
    which takes them up if `made` (how, as values for JSON) is the same and their weights began the same; a layer that
    was stopped half way begins anew.
    `stop` is asked after every step.
    Raises: InputError when there are too few batches, or a layer's error is not finite; Stopped when `stop` said so.
    """
    parts = [
        part for part, _ in zip(batches, range(config.rows // config.batch_size), strict=False)
    ]
    if len(parts) < config.rows // config.batch_size:
        raise InputError(f"blockwise.rows={config.rows}: the text has {len(parts)} batches of them")
    exact, walk = (
        Layerwise(fitted.config, {}, options),
        Layerwise(fitted.config, fitted.plans, options),
    )
    targets = [_waiting(exact.begin(parameters, part)) for part in parts]
    inputs = [_waiting(walk.begin(parameters, part)) for part in parts]
    done = RebuiltLayers(kept, made or {})
    out, layers = dict(parameters), fitted.config.layers
    for index in range(layers):
        leaves = walk.leaves_of(parameters, index)
        targets = _through(exact, index, leaves, targets)
        layer = _Layer(walk, index, config, targets)
        reached = _through(walk, index, leaves, inputs)
        before = layer.error(reached)
        found = done.take_up(index, leaves)
        if found is None:
            told = _told(progress, index, layers, config.steps)
            found = jax.device_get(layer.trained(leaves, inputs, seed, told, stop))
        inputs = _through(walk, index, found, inputs)
        errors = Rebuilt(layer=index, before=before, after=layer.error(inputs))
        done.keep(errors, leaves, found)
        out |= {f"layers/{index}/{name}": leaf for name, leaf in found.items()}
        if progress:
            said = f"layer {index}: error {errors.before:.3g} to {errors.after:.3g}"
            progress(said, config.steps, config.steps)
    return out, done.errors


def _told(progress: Progress | None, index: int, layers: int, steps: int) -> Callable[[int], None]:
    def told(step: int) -> None:
        if progress:
            progress("reconstruct", index * steps + step, layers * steps)

    return told


def _waiting(flow: Flow) -> Flow:
    """The same batch in host memory."""
    return jax.device_get(flow)


def _through(
    walk: Layerwise, index: int, leaves: Mapping[str, Any], flows: Sequence[Flow]
) -> list[Flow]:
    """Every batch behind layer `index`."""
    there = jax.device_put(dict(leaves))
    return [_waiting(walk.layer(index, there, flow)) for flow in flows]


@dataclasses.dataclass(frozen=True)
class _How:
    """All of a layer's step that its numbers are not: layers that are equal in it share a program."""

    shape: LayerShape
    plans: tuple[tuple[str, Plan], ...]
    optimizer: OptimizerConfig
    steps: int

    def optimizer_of(self, leaves: Mapping[str, Any]) -> optax.GradientTransformation:
        return make_optimizer(self.optimizer, self.steps, leaves)


class _Layer:
    """One layer's turn: what it is to say, and the steps that bring it there."""

    def __init__(
        self, walk: Layerwise, index: int, config: BlockwiseConfig, targets: Sequence[Flow]
    ) -> None:
        plans = tuple(sorted(walk.plans_of(index).items()))
        shape = walk.config.layer_shape(index)
        self._how = _How(shape, plans, config.optimizer, config.steps)
        self._index, self._targets = index, [flow.x for flow in targets]
        own = [_squares(flow.x, jnp.zeros_like(flow.x), flow.segments) for flow in targets]
        tokens = sum(int(np.sum(flow.segments > 0)) for flow in targets)
        self._total = math.fsum(map(float, own))
        self._power = self._total / max(tokens, 1)

    def error(self, reached: Sequence[Flow]) -> float:
        """Returns the squared error of what was reached, over the squares of the targets."""
        pairs = zip(reached, self._targets, strict=True)
        return math.fsum(float(_squares(f.x, t, f.segments)) for f, t in pairs) / self._total

    def trained(
        self,
        leaves: Mapping[str, Any],
        inputs: Sequence[Flow],
        seed: int,
        told: Callable[[int], None],
        stop: Stop | None,
    ) -> dict[str, jax.Array]:
        """Returns the layer's leaves after its steps.

        Raises: InputError when an error is not finite, Stopped when `stop` said so.
        """
        own = {name: jnp.array(leaf) for name, leaf in leaves.items()}  # Copies: steps donate them.
        moments = self._how.optimizer_of(own).init(own)
        before = None
        for number, at in zip(range(self._how.steps), self._order(seed, len(inputs)), strict=False):
            around = self._around(inputs[at])
            own, moments, error = _step(
                self._how, own, moments, *around, self._targets[at], self._power
            )
            self._refuse(before, number)  # That of the step before, so that the device has work.
            before = error
            told(number + 1)
            if stop is not None and stop(0):
                raise Stopped(
                    f"stopped in the reconstruction of layer {self._index}; the same command goes on from its beginning"
                )
        self._refuse(before, self._how.steps)
        return own

    def _refuse(self, error: Any, number: int) -> None:
        if error is not None and not math.isfinite(float(error)):
            raise InputError(
                f"layer {self._index}: the error of its reconstruction is {float(error)} in step {number}; a smaller "
                "blockwise.learning_rate may help"
            )

    def _order(self, seed: int, batches: int) -> Iterator[int]:
        """Numbers of batches, each once an epoch."""
        draws = np.random.default_rng([seed, self._index])
        while True:
            yield from draws.permutation(batches)

    def _around(self, flow: Flow) -> tuple[Any, ...]:
        per_layer = None if flow.per_layer is None else flow.per_layer[self._index]
        source = flow.sources.get(self._how.shape.kind) if self._how.shape.shares_kv else None
        return flow.x, flow.positions, flow.segments, per_layer, source


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def _step(
    how: _How, leaves: dict[str, jax.Array], moments: Any, x: jax.Array, positions: jax.Array,
    segments: jax.Array, per_layer: Any, source: Any, target: jax.Array, power: jax.Array,
) -> tuple[dict[str, jax.Array], Any, jax.Array]:  # fmt: skip
    """Returns (leaves after a step, optimizer state, error before it); `power` is the target's squares per token."""

    def error(leaves: dict[str, jax.Array]) -> jax.Array:
        out, _ = run_block(
            how.shape, dict(how.plans), leaves, x, positions, segments, per_layer, source
        )
        tokens = jnp.maximum(jnp.sum(segments > 0), 1)
        return _squares(out, target, segments) / (tokens * power)

    value, gradient = jax.value_and_grad(error)(leaves)
    updates, moments = how.optimizer_of(leaves).update(gradient, moments, leaves)
    moved = optax.apply_updates(leaves, updates)
    return moved, moments, value  # type: ignore[return-value]


@jax.jit
def _squares(
    x: Float[Array, "B T D"], target: Float[Array, "B T D"], segments: Int[Array, "B T"]
) -> Float[Array, ""]:
    """Returns the sum of squared differences over tokens that are no padding, float32."""
    off = jnp.square(x.astype(jnp.float32) - target.astype(jnp.float32))
    return jnp.sum(jnp.where(segments > 0, jnp.sum(off, axis=-1), 0.0))
