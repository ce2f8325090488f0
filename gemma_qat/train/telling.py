"""From the record of a run to points: what is told at a report, to whom, and when."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from gemma_qat.train.codes import use_by_format
from gemma_qat.train.points import Listener, Point
from gemma_qat.train.record import Record
from gemma_qat.train.speed import Speed


class Telling:
    """Makes points of what a record has grown by, and tells listeners of them."""

    def __init__(
        self,
        record: Record,
        rate: Callable[[Any], Any],
        listeners: Sequence[Listener],
        progress: Callable[[int, int], None] | None,
    ) -> None:
        """`rate` is the learning rate by the number of updates before; `progress` hears how many are done."""
        self._record, self._rate, self._listeners = record, rate, listeners
        self._progress = progress
        self._told = record.last
        self._counts: dict[int, Any] = {}

    def counted(self, step: int, counts: Any) -> None:
        """Keeps the counts of codes after `step`, still on the devices, until the metrics of that step are read."""
        self._counts[step] = counts

    def tell(self, number: int, speed: Speed) -> None:
        """Tells of every point that came up since the last call; `number` steps are done."""
        grown = self._record.after(self._told)
        if not grown:
            return
        self._told = max(grown)
        if self._progress is not None:
            self._progress(number, self._record.steps)
        fast = speed.asked()
        for step, metrics in grown.items():
            counts = self._counts.pop(step, {})
            if self._listeners:
                more = {"learning_rate": float(self._rates[step - 1])}
                point = Point(
                    step=step, steps=self._record.steps, metrics=metrics | more | fast,
                    code_use=use_by_format(counts),
                )  # fmt: skip
                for listener in self._listeners:
                    listener(point)

    @functools.cached_property
    def _rates(self) -> np.ndarray:
        """The learning rate of every update: asked for one by one, the devices would have to run dry for each."""
        steps = self._record.steps
        return np.broadcast_to(np.asarray(self._rate(jnp.arange(steps))), (steps,))
