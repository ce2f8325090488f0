"""Looking inside a forward pass without changing it.

A `Taps` is a plain dict that layers write named intermediates and quantized weights into when one is given; with None
nothing is kept. It is filled while a function is traced, so a jitted function that wants the values returns them.

`Statistics` is the other listener: it keeps no arrays of the model's size, only a summary of what passes each static
scale (`quant/observe.py`) and how many tokens each expert got. Calibration listens with it. `Loads` keeps the latter
alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

Taps = dict[str, Any]


class Statistics(dict[str, Any]):
    """Taps that keep summaries only."""


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


def tap(taps: Taps | None, name: str, value: Any) -> None:
    """Keeps `value` under `name` if anybody is listening to values."""
    if looks_inside(taps) and not isinstance(taps, Statistics):
        assert taps is not None
        taps[name] = value


def looks_inside(taps: Taps | None) -> bool:
    """Whether anybody listens to what happens within a layer: then the layer runs in its plainest form."""
    return taps is not None and not isinstance(taps, Loads)


def tally(taps: Taps | None, name: str, summary: Callable[[], Any]) -> None:
    """Keeps `summary()` under `name` if anybody is listening to counts."""
    if isinstance(taps, (Statistics, Loads)):
        taps[name] = summary()


def record(taps: Taps | None, name: str, summary: Callable[[], Any]) -> None:
    """Keeps `summary()` under `name` if anybody is listening to statistics."""
    if isinstance(taps, Statistics):
        taps[name] = summary()


def under(taps: Taps | None, prefix: str, inner: Taps | None) -> None:
    """Moves everything of `inner` into `taps` with `prefix/` in front."""
    if taps is not None and inner is not None:
        taps.update({f"{prefix}/{name}": value for name, value in inner.items()})


def listen(taps: Taps | None) -> Taps | None:
    """Returns an empty listener of the same kind for a part, if anybody listens to the whole."""
    return None if taps is None else type(taps)()
