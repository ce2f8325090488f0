"""Looking inside a forward pass without changing it.

A `Taps` is a plain dict that layers write named intermediates and quantized weights into when one is given; with None
nothing is kept. It is filled while a function is traced, so a jitted function that wants the values returns them.

`Statistics` is the other listener: it keeps no arrays of the model's size, only a summary of what passes each static
scale (`quant/observe.py`) and how many tokens each expert got. Calibration listens with it. `Loads` keeps the latter
alone, `Residuals` what each layer leaves as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Taps = dict[str, Any]


class Statistics(dict[str, Any]):
    """Taps that keep summaries only, of what `valid` marks True.

    Shapes: `valid`, bool, has the first axes of whatever is summarized: [B, T], or [C] for rows sorted by expert.
    """

    def __init__(self, valid: jax.Array | None = None) -> None:
        super().__init__()
        self.valid = valid


class Moments(dict[str, Any]):
    """Taps that keep second moments of the inputs of weights (`.../moments`), of what `valid` marks True.

    `full`: whole matrices E[x x^T] as sums, [R, R] ([E, R, R] of experts, each of its own tokens); else their
    diagonals alone. Shapes: `valid` as of `Statistics`.
    """

    def __init__(self, valid: jax.Array, *, full: bool) -> None:
        super().__init__()
        self.valid, self.full = valid, full


class Loads(dict[str, Any]):
    """Taps that keep how many tokens chose each expert (`.../router/tokens`, int32 [E]), and nothing else.

    Cheap enough for every training step, and layers that move rows between devices go on doing so.
    """

    def metrics(self) -> dict[str, Any]:
        """Returns over all layers the tokens of the busiest expert, the mean, and the share of experts without any.

        Units: tokens of one batch per expert; empty where no layer has experts.
        """
        counts = [value for name, value in self.items() if name.endswith("router/tokens")]
        if not counts:
            return {}
        load = jnp.stack(counts).astype(jnp.float32)
        return {
            "expert_load_max": jnp.max(load),
            "expert_load_mean": jnp.mean(load),
            "experts_idle": jnp.mean((load == 0).astype(jnp.float32)),
        }


class Residuals(Loads):
    """Loads that also keep the residual stream after each layer (`layers/17/out`, [B, T, D])."""


def tap(taps: Taps | None, name: str, value: Any) -> None:
    """Keeps `value` under `name` if anybody is listening to values."""
    if looks_inside(taps) and not isinstance(taps, (Statistics, Moments)):
        assert taps is not None
        taps[name] = value


def leave(taps: Taps | None, name: str, value: Any) -> None:
    """Keeps what a layer leaves under `name` if anybody is listening to that, or to values within."""
    if isinstance(taps, Residuals):
        taps[name] = value
    tap(taps, name, value)


def looks_inside(taps: Taps | None) -> bool:
    """Whether anybody listens to what happens within a layer: then the layer runs in its plainest form."""
    return taps is not None and not isinstance(taps, Loads)


def tally(taps: Taps | None, name: str, summary: Callable[[], Any]) -> None:
    """Keeps `summary()` under `name` if anybody is listening to counts."""
    if isinstance(taps, (Statistics, Loads)):
        taps[name] = summary()


def record(taps: Taps | None, name: str, summary: Callable[[jax.Array | None], Any]) -> None:
    """Keeps `summary(valid)` under `name` if anybody is listening to statistics."""
    if isinstance(taps, Statistics):
        taps[name] = summary(taps.valid)


def weigh(
    taps: Taps | None, name: str, moments: Callable[[jax.Array, bool], dict[str, jax.Array]]
) -> None:
    """Keeps `moments(valid, full)` under `name` if anybody is listening to moments."""
    if isinstance(taps, Moments):
        taps[name] = moments(taps.valid, taps.full)


def counted(taps: Taps | None) -> jax.Array | None:
    """Returns which tokens a listener to statistics or moments counts; None for all."""
    return taps.valid if isinstance(taps, (Statistics, Moments)) else None


def among(taps: Taps | None, chosen: Callable[[jax.Array], jax.Array]) -> Taps | None:
    """Returns an empty listener of the same kind for tokens in another order: `chosen` reorders what is counted."""
    valid = counted(taps)
    if isinstance(taps, Moments):
        return Moments(chosen(taps.valid), full=taps.full)
    return listen(taps) if valid is None else Statistics(chosen(valid))


def under(taps: Taps | None, prefix: str, inner: Taps | None) -> None:
    """Moves everything of `inner` into `taps` with `prefix/` in front."""
    if taps is not None and inner is not None:
        taps.update({f"{prefix}/{name}": value for name, value in inner.items()})


def listen(taps: Taps | None) -> Taps | None:
    """Returns an empty listener of the same kind for a part, if anybody listens to the whole."""
    return None if taps is None else fresh(taps)


def fresh(taps: Taps) -> Taps:
    """Returns an empty listener of the same kind, which counts the same tokens."""
    if isinstance(taps, Moments):
        return Moments(taps.valid, full=taps.full)
    return Statistics(taps.valid) if isinstance(taps, Statistics) else type(taps)()
