"""What a run says of itself at a report, and who listens.

The loop makes one `Point` a report and hands it to every listener: the metrics file, the console, TensorBoard. In a run
of several processes only the first one's listeners hear anything; what a point holds is made by all of them together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """One report.

    Units: `step` counts updates of `steps` in all; `metrics` are those of docs/training.md, `seconds` per step.
    Shapes: `code_use` int64 [codes] by format, lowest code first, over all sites; empty where codes are not counted.
    """

    step: int
    steps: int
    metrics: Mapping[str, float]
    code_use: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


Listener = Callable[[Point], None]
