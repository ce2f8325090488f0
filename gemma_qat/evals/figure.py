"""One figure of a report: where it stands, what it says, how it is drawn."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

QUALITY, TRAINING, GRID, STORED, SPEED = "quality", "training", "grid", "stored", "speed"
"""Parts of the page that figures stand in."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure of the report. `name` is its file's; `draw` takes 'svg' or 'png'."""

    name: str
    part: str
    caption: str
    draw: Callable[[str], bytes]
