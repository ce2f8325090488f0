"""Looking inside a forward pass without changing it.

A `Taps` is a plain dict that layers write named intermediates and quantized weights into when one is given; with None
nothing is kept. It is filled while a function is traced, so a jitted function that wants the values returns them.
"""

from __future__ import annotations

from typing import Any

Taps = dict[str, Any]


def tap(taps: Taps | None, name: str, value: Any) -> None:
    """Keeps `value` under `name` if anybody is listening."""
    if taps is not None:
        taps[name] = value


def under(taps: Taps | None, prefix: str, inner: Taps | None) -> None:
    """Moves everything of `inner` into `taps` with `prefix/` in front."""
    if taps is not None and inner is not None:
        taps.update({f"{prefix}/{name}": value for name, value in inner.items()})


def listen(taps: Taps | None) -> Taps | None:
    """Returns an empty Taps for a part, if anybody listens to the whole."""
    return None if taps is None else {}
