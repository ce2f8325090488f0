"""Static scales of activations, keys and values: measured on text, then written beside the weights.

The model runs with its weights on their grid and every static scale at 0 (identity), so what is measured is what the
float activations of the deployed weights are; padding is left out. Each batch leaves a summary of fixed size per scale
(`quant/observe.py`); the method turns the summaries into a scale.

On a mesh the model stays where it lies, and each device runs its own rows of a batch.

With experts, a token reaches only those it chose. `all_experts` sends every token to every expert while calibrating,
with weight 0 where it was not chosen: the model's output is the same, and no expert goes without data. How many tokens
chose each expert is counted either way.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_qat.errors import InputError, refuse_outside, unknown
from gemma_qat.models import Gemma4, static_scale_paths
from gemma_qat.models.gemma4 import head_name
from gemma_qat.models.leaves import unstack_layers
from gemma_qat.nn.module import merge, split
from gemma_qat.nn.taps import Statistics
from gemma_qat.quant import Plans
from gemma_qat.quant.observe import CALIBRATIONS, Seen, scale_of
from gemma_qat.sharding import Placement, batch_parts, batch_sharding, constrain, from_host

LOGITS = 2**27
"""Most logits that are held at once, float32."""

Batch = Mapping[str, Any]
"""tokens, positions, segments int32 [B, T]."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """How static scales are found, on what text, and on how much of it.

    `split` "train" is the rows that are trained on; another names a part of the data (kinds `stdlib`, `tfds`), such as
    validation. What models are measured on, `test`, is refused.
    Units: `batches` batches at most. A training run makes them of `batch_size` rows, of which it takes the first
    `length` tokens (0: whole rows).
    """

    method: str = "mse"
    batches: int = 8
    batch_size: int = 8
    length: int = 512
    all_experts: bool = True
    split: str = "train"

    def __post_init__(self) -> None:
        if self.method not in CALIBRATIONS:
            raise unknown("calibration method", self.method, CALIBRATIONS)
        for name, least in (("batches", 1), ("batch_size", 1), ("length", 0)):
            refuse_outside(f"calibration.{name}", getattr(self, name), least)
        named = {part.split("[")[0].strip() for part in self.split.split("+")}
        if named & {"", "all", "test"}:
            raise InputError(
                f"calibration.split={self.split}: what models are measured on is not calibrated on; train, validation "
                "or another part of the data expected"
            )


def batch_of(tokens: Any, vocab: int) -> dict[str, np.ndarray]:
    """Returns token ids [B, T] as a batch for calibration: one segment a row.

    Raises: InputError for another shape, no tokens, or one outside the vocabulary.
    """
    rows = np.asarray(tokens)
    if rows.ndim != 2 or not rows.size or rows.dtype.kind not in "iu":
        raise InputError(
            f"calibration: integer tokens of shape [B, T] expected, {rows.dtype} {rows.shape} given"
        )
    if rows.min() < 0 or rows.max() >= vocab:
        raise InputError(f"calibration: a token is outside the vocabulary of {vocab}")
    positions = np.broadcast_to(np.arange(rows.shape[1], dtype=np.int32), rows.shape)
    segments = np.ones(rows.shape, np.int32)
    return {"tokens": rows.astype(np.int32), "positions": positions, "segments": segments}


@dataclasses.dataclass(frozen=True)
class Calibrated:
    """Static scales by checkpoint path, how many tokens chose each expert, by layer, and what a method had to tell."""

    scales: dict[str, np.ndarray]
    expert_tokens: dict[int, np.ndarray]
    notes: tuple[str, ...] = ()

    def coverage(self) -> list[str]:
        """Returns notes, and a line per layer with experts: the fewest and most tokens one got, how many got none."""
        return [*self.notes, *self._experts()]

    def _experts(self) -> list[str]:
        return [
            f"layer {layer}: {counts.size} experts, tokens per expert {counts.min()} to {counts.max()}, "
            f"{int((counts == 0).sum())} chosen by none"
            for layer, counts in sorted(self.expert_tokens.items())
        ]


def calibrate(
    model: Gemma4,
    batches: Iterable[Batch],
    config: CalibrationConfig = CalibrationConfig(),
    progress: Callable[[str, int, int], None] | None = None,
) -> Calibrated:
    """Returns the static scales of `model` (fake-quantized or packed) on at most `config.batches` batches.

    Raises: InputError when there are no batches, when one makes an activation infinite or nan, or when a site saw no
        data.
    """
    plans: Plans = dict(model.plans)
    wanted = static_scale_paths(plans)
    graph, state = split(_prepared(model, config))
    seen: dict[str, Seen] = {path: Seen() for path in wanted}
    tokens: dict[int, np.ndarray] = {}
    number = 0
    for batch in batches:
        if number == config.batches:
            break
        arrays = _rows(batch, model.placement)
        for path, summary in jax.device_get(_statistics(graph, LOGITS, state, *arrays)).items():
            if path in seen:
                seen[path].add(summary, path)
            elif path.endswith("router/tokens"):
                layer = int(path.split("/")[1])
                tokens[layer] = tokens.get(layer, 0) + np.asarray(summary)
        number += 1
        if progress:
            progress("calibrate", number, config.batches)
    if not number:
        raise InputError("calibration: no batches of text given, at least one expected")
    highest = {
        f"{path}_{name}": how.highest
        for path, plan in plans.items()
        for name, how in plan.activations.items()
    }
    scales = {path: scale_of(seen[path], config.method, highest[path], path) for path in wanted}
    return Calibrated(scales, tokens)


def _rows(batch: Batch, placement: Placement | None) -> list[Any]:
    """The arrays of a batch; on a mesh cut by rows, padded with rows of padding to as many as can be cut evenly."""
    arrays = [np.asarray(batch[name]) for name in ("tokens", "positions", "segments")]
    if placement is None:
        return list(arrays)
    mesh = placement.mesh
    more = -len(arrays[0]) % batch_parts(mesh)
    return [from_host(np.pad(x, ((0, more), (0, 0))), batch_sharding(mesh)) for x in arrays]


def _prepared(model: Gemma4, config: CalibrationConfig) -> Gemma4:
    """The same model with static scales at 0, and every expert called if asked for."""
    plans, experts = dict(model.plans), model.config.experts
    size = model.config
    if config.all_experts and experts is not None:
        size = dataclasses.replace(size, experts=dataclasses.replace(experts, calls_all=True))
    names = set(static_scale_paths(plans))
    layered = unstack_layers(model.leaves(), model.config, plans)
    layered |= {path: np.zeros(1, np.float32) for path in names}
    return Gemma4.from_parameters(size, layered, plans, model.options, model.placement)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _statistics(
    graph: Any, most: int, state: Any, tokens: Any, positions: Any, segments: Any
) -> dict[str, Any]:
    model = merge(graph, state)
    taps = Statistics(segments > 0)
    hidden, _ = model.hidden(tokens, positions, segments, taps=taps)
    plan = dict(model.plans).get(f"{head_name(model.config)}/table")
    found = dict(taps)
    if plan is not None and plan.static_scales:
        found |= _head_statistics(model, most, hidden, segments > 0)
    # Summaries are small: every device, so every process, gets them whole.
    return jax.tree.map(lambda x: constrain(x, (None,) * x.ndim, model.placement), found)


def _head_statistics(
    model: Gemma4, most: int, hidden: jax.Array, valid: jax.Array
) -> dict[str, Any]:
    """Returns the head's summaries, one for each chunk of positions: all logits at once may not fit anywhere."""
    B, T, D = hidden.shape
    size = max(1, min(T, most // (B * model.config.vocab_size)))
    missing = -T % size
    hidden = jnp.pad(hidden, ((0, 0), (0, missing), (0, 0)))
    valid = jnp.pad(valid, ((0, 0), (0, missing)))
    count = (T + missing) // size

    def one(part: tuple[jax.Array, jax.Array]) -> dict[str, Any]:
        taps = Statistics(part[1])
        model.logits(part[0], taps)
        return dict(taps)

    chunks = (hidden.reshape(B, count, size, D), valid.reshape(B, count, size))
    return jax.lax.map(one, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), chunks))
