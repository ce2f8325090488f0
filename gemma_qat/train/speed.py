"""How fast a run is, and the file its metrics go to.

Units: tokens/s counts all tokens of the rows, over all devices. Model FLOPs are those of the mathematics (three times
the student's forward pass, the teacher's once; no rematerialization), as in PaLM's definition of model FLOPs
utilization (arXiv 2204.02311, appendix B); `mfu` is their share of the devices' peak for bfloat16, where it is known.

Peaks: docs.cloud.google.com/tpu/docs (v5p, v5e, v6e); NVIDIA's data sheets, dense, without sparsity.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from gemma_qat.models import ModelConfig, flops_per_token, forward_flops_per_token
from gemma_qat.train.points import Point

PEAK_FLOPS = {
    "TPU v5p": 459e12, "TPU v5": 459e12, "TPU v5 lite": 197e12, "TPU v6 lite": 918e12,
    "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12,
}  # fmt: skip
"""bfloat16 FLOPs per second of one device, by jax's `device_kind`."""


class Speed:
    """Tokens and model FLOPs per second since it was last asked."""

    def __init__(self, student: ModelConfig, teacher: ModelConfig | None, rows: int) -> None:
        """`rows` is the rows of a step over all devices."""
        self._student, self._teacher, self._rows = student, teacher, rows
        self._length, self._since, self._steps = 0, time.perf_counter(), 0

    def step(self, length: int) -> None:
        """Counts a step of rows of `length` tokens."""
        self._length, self._steps = length, self._steps + 1

    def asked(self) -> dict[str, float]:
        """Returns seconds (a step), tokens_per_second, model_flops_per_second and, on known devices, mfu.

        Nothing before a step.
        """
        now = time.perf_counter()
        seconds, steps = now - self._since, self._steps
        self._since, self._steps = now, 0
        if not steps or seconds <= 0:
            return {}
        rate = steps * self._rows * self._length / seconds
        each = flops_per_token(self._student, self._length)
        if self._teacher is not None:
            each += forward_flops_per_token(self._teacher, self._length)
        found = {"seconds": seconds / steps, "tokens_per_second": rate}
        found["model_flops_per_second"] = rate * each
        peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
        if peak is not None:
            found["mfu"] = rate * each / (peak * jax.device_count())
        return found


class MetricsFile:
    """Metrics as JSON lines, one a report; a run that goes on from a save drops the lines after it."""

    def __init__(self, path: Path) -> None:
        self._path, self._begun = path, False

    def __call__(self, point: Point) -> None:
        """Adds the line of a point."""
        self.write(point.step, point.metrics)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Adds a line; the first one of a process takes the place of lines of its step and later."""
        if not self._begun:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            lines = self._path.read_text("utf-8").splitlines() if self._path.is_file() else []
            kept = [line for line in lines if _step(line) < step]
            beside = self._path.with_name(f".{self._path.name}.part")
            beside.write_text("".join(f"{line}\n" for line in kept), "utf-8")
            os.replace(beside, self._path)
            self._begun = True
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # Cut off by whatever ended the run.
