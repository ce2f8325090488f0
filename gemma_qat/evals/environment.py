"""Where figures were measured."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

import jax


def environment() -> dict[str, Any]:
    """Returns versions and devices, as a report shows them."""
    devices = jax.devices()
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in ("jax", "flax", "gemma_qat")},
        "device": f"{len(devices)} x {devices[0].device_kind}",
    }
