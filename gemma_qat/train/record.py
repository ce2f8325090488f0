"""What is measured on the way: the one place where metrics come to the host, are checked, and become curves.

The loop runs ahead of the devices. Metrics of a step are read when `AHEAD` further steps have been given to the
devices, so reading them leaves the devices with work, and a loss that is not a number is seen at most `AHEAD` steps
after it came up. A save first reads everything up to its step (`settle`): what is saved was checked.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from gemma_qat.errors import InputError

AHEAD = 2
"""Steps in the hands of the devices while the host prepares the next: enough to keep them busy."""

CHECKED = ("loss", "grad_norm")
"""Metrics that have to be finite: parameters are after an update with a gradient that is not, whatever the loss was."""

Curve = list[tuple[int, float]]


class Record:
    """The curves of a run: the mean of each metric over every `log_every` steps."""

    def __init__(self, log_every: int, steps: int) -> None:
        """Starts empty; a record of `steps` steps ends with a point at the last."""
        self.log_every, self.steps = log_every, steps
        self.curves: dict[str, Curve] = {}
        self.arrays: dict[str, np.ndarray] = {}
        """Metrics that are arrays, as they were at the last step read."""
        self._unread: deque[tuple[int, Mapping[str, jax.Array], Any]] = deque()
        self._window: list[dict[str, float]] = []

    def add(self, step: int, metrics: Mapping[str, jax.Array], ids: Any = None) -> bool:
        """Takes the metrics of a step, still on the devices, and the ids of its rows; returns whether a curve grew.

        Raises: InputError when a loss read by now is not finite, naming its step and rows.
        """
        self._unread.append((step, metrics, ids))
        points = len(self._points())
        while len(self._unread) > AHEAD:
            self._read()
        return len(self._points()) > points

    def settle(self) -> None:
        """Reads everything there is.

        Raises: InputError when a loss is not finite, naming its step and rows.
        """
        while self._unread:
            self._read()

    @property
    def last(self) -> int:
        """The step of the newest point, 0 before there is one."""
        return max((curve[-1][0] for curve in self.curves.values()), default=0)

    def after(self, step: int) -> dict[int, dict[str, float]]:
        """Returns the points of all curves after `step`, by step."""
        found: dict[int, dict[str, float]] = {}
        for name, curve in self.curves.items():
            for at, value in itertools.takewhile(lambda point: point[0] > step, reversed(curve)):
                found.setdefault(at, {})[name] = value
        return dict(sorted(found.items()))

    def state(self) -> dict[str, Any]:
        """Returns curves and the means that have begun, as values for JSON, exactly."""
        return {"curves": self.curves, "window": self._window}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state` returned."""
        self.curves = {
            name: [(int(step), float(value)) for step, value in curve]
            for name, curve in state["curves"].items()
        }
        self._window = [dict(metrics) for metrics in state.get("window", [])]

    def _points(self) -> Curve:
        return self.curves.get("loss", [])

    def _read(self) -> None:
        step, metrics, ids = self._unread.popleft()
        read = jax.device_get(dict(metrics))
        host = {name: float(value) for name, value in read.items() if not np.ndim(value)}
        self.arrays = {name: np.asarray(value) for name, value in read.items() if np.ndim(value)}
        _check(step, host, ids)
        self._window.append(host)
        if step % self.log_every == 0 or step == self.steps:
            for name in host:
                mean = float(np.mean([one[name] for one in self._window if name in one]))
                self.curves.setdefault(name, []).append((step, mean))
            self._window = []


def _check(step: int, metrics: Mapping[str, float], ids: Any) -> None:
    for name in CHECKED:
        if not np.isfinite(metrics.get(name, 0.0)):
            rows = f" on rows {', '.join(map(str, np.ravel(ids)))}" if ids is not None else ""
            what = "loss" if name == "loss" else "norm of the gradient"
            raise InputError(
                f"step {step}: the {what} is {metrics[name]}{rows}; nothing was saved over the last good step"
            )
