"""From what flows through a site to the static scale it is rounded with.

A forward pass leaves, for every static scale, a summary of fixed size: the largest magnitude and a histogram of
magnitudes whose bins are 1/32 of an octave wide, from 2^-20 (what lies below counts in the first bin) to 2^40 (what
lies above is an error). Padding is left out. Summaries of many batches add up, so calibration needs the memory of one.

| method | the largest magnitude that is kept |
|---|---|
| max | the largest seen |
| ema | average over batches of each batch's largest, weights falling by 0.9 |
| percentile | the magnitude that 99.99 % of elements do not exceed |
| mse | where the expected squared error is least (see below) |

The scale is that magnitude / (2^(bits-1) - 1). `mse` counts x^2 for what rounds to 0, step^2 / 12 for what is rounded
inside the range, and the squared excess for what saturates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_qat.errors import InputError

PER_OCTAVE, LOWEST, HIGHEST = 32, -20, 40
BINS = PER_OCTAVE * (HIGHEST - LOWEST)
EDGES = 2.0 ** (LOWEST + np.arange(BINS + 1) / PER_OCTAVE)
MIDDLES = np.sqrt(EDGES[:-1] * EDGES[1:])
EMA_DECAY = 0.9
PERCENTILE = 99.99


def summarize(x: jax.Array, valid: jax.Array | None = None) -> dict[str, jax.Array]:
    """Returns the summary of one batch: `largest` [] and `histogram` [BINS] uint32; zeros are in the lowest bin.

    Shapes: `valid`, bool, has the first axes of `x`; what it marks False is not counted.
    Raises: InputError when the batch has more elements than a bin can count.
    """
    if x.size >= 2**32:
        raise InputError(
            f"calibration: {x.size} elements at one site in one batch, fewer than {2**32} expected; "
            "take smaller or shorter batches"
        )
    counted = jnp.ones(x.shape, bool)
    if valid is not None:
        last = tuple(range(valid.ndim, x.ndim))
        counted = jnp.broadcast_to(jnp.expand_dims(valid, last), x.shape)
    counted = counted.reshape(x.size)
    magnitude = jnp.where(counted, jnp.abs(x.astype(jnp.float32)).reshape(x.size), 0.0)
    octave = jnp.log2(jnp.maximum(magnitude, 2.0**LOWEST)) - LOWEST
    index = jnp.clip((octave * PER_OCTAVE).astype(jnp.int32), 0, BINS - 1)
    histogram = jnp.zeros(BINS, jnp.uint32).at[index].add(counted.astype(jnp.uint32))
    return {"largest": jnp.max(magnitude), "histogram": histogram}


@dataclasses.dataclass
class Seen:
    """What passed one site so far."""

    largest: list[float] = dataclasses.field(default_factory=list)
    histogram: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(BINS))

    def add(self, summary: Any, where: str) -> None:
        """Adds one batch, in one summary or in several along a leading axis.

        Raises: InputError naming `where` when the batch held an infinity, a nan, or more than the bins reach.
        """
        value = float(np.max(summary["largest"]))
        if not np.isfinite(value):
            raise InputError(
                f"{where}: calibration data made {value} here; only finite values can be calibrated"
            )
        if value >= EDGES[-1]:
            raise InputError(
                f"{where}: calibration data made {value:g} here, less than 2^{HIGHEST} expected"
            )
        self.largest.append(value)
        counts = np.asarray(summary["histogram"], np.float64)
        self.histogram = self.histogram + counts.reshape(counts.size // BINS, BINS).sum(0)

    @property
    def is_empty(self) -> bool:
        """Whether nothing but zeros was seen."""
        return not self.largest or max(self.largest) == 0.0


def _max(seen: Seen, highest: int) -> float:
    return max(seen.largest)


def _ema(seen: Seen, highest: int) -> float:
    average = seen.largest[0]
    for value in seen.largest[1:]:
        average = EMA_DECAY * average + (1 - EMA_DECAY) * value
    return average


def _percentile(seen: Seen, highest: int) -> float:
    below = np.cumsum(seen.histogram)
    index = int(np.searchsorted(below, below[-1] * PERCENTILE / 100))
    return min(float(EDGES[index + 1]), max(seen.largest))


def _least_squares(seen: Seen, highest: int) -> float:
    used = np.flatnonzero(seen.histogram)
    x, n = MIDDLES[used], seen.histogram[used]
    # Every edge down to six octaves under the largest: the best bound may lie where no element does.
    last = int(used[-1]) + 1
    bounds = np.append(EDGES[max(1, last - 6 * PER_OCTAVE) : last + 1], max(seen.largest))
    step = bounds[:, None] / highest
    excess = np.maximum(x[None] - (highest + 0.5) * step, 0.0)
    error = np.where(x[None] < step / 2, x[None] ** 2, step**2 / 12)
    error = np.where(excess > 0, (x[None] - highest * step) ** 2, error)
    return float(min(bounds[int(np.argmin(error @ n))], max(seen.largest)))


CALIBRATIONS: dict[str, Callable[[Seen, int], float]] = {
    "max": _max,
    "ema": _ema,
    "percentile": _percentile,
    "mse": _least_squares,
}


def scale_of(seen: Seen, method: str, highest: int, where: str) -> np.ndarray:
    """Returns the static scale of a site, float32 [1].

    Raises: InputError when the site saw no data, or nothing but zeros.
    """
    if seen.is_empty:
        raise InputError(
            f"{where}: saw no data, so it has no scale; calibrate on text that reaches it"
        )
    return np.asarray([CALIBRATIONS[method](seen, highest) / highest], np.float32)
