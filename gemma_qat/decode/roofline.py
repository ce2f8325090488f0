"""What a decode step has to read, and how fast this device can: the least time a step can take is their quotient.

    weights     every leaf once; of a looked-up table only the rows of the batch, but a tied embedding is the head too
    experts     the share that a batch can choose at most: min(1, tokens x experts of a token / experts)
    cache       the slots that hold something, keys and values with their scales

What is written and what stays on the chip between layers is small beside it and left out. The bandwidth is measured,
not looked up: a copy of an array larger than any cache, bytes read plus bytes written over time.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_qat.models.declare import declare
from gemma_qat.models.gemma4 import Gemma4
from gemma_qat.quant.sites import EXPERTS

_LOOKED_UP = ("embed", "per_layer_embed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes of one step of a batch."""

    weights: float
    experts: float
    cache: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.weights + self.experts + self.cache


def traffic(model: Gemma4, batch: int, length: int, cache: str = "float") -> Traffic:
    """Returns the bytes that a step reads when every row has `length` tokens behind it."""
    config = model.config
    declared = declare(config)
    weights = experts = 0.0
    for path, leaf in jax.eval_shape(model.parameters).items():  # nothing is unstacked
        parameter = declared.get(path)
        size = sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(leaf))
        role = parameter.role if parameter is not None else ""
        if role in EXPERTS:
            assert config.experts is not None
            experts += size * min(1.0, batch * config.experts.per_token / config.experts.count)
        elif role in _LOOKED_UP and not (role == "embed" and config.ties_head):
            assert parameter is not None
            weights += size * batch / parameter.shape[0]
        else:
            weights += size
    kept = jax.eval_shape(
        lambda: model.empty_caches(batch, length, None if cache == "float" else cache)
    )
    return Traffic(
        weights=weights, experts=experts,
        cache=float(sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(kept))),
    )  # fmt: skip


def copy_bandwidth(megabytes: int = 256, rounds: int = 7) -> float:
    """Returns bytes a second of copying an array on the default device, read and written counted: the median of some.

    Units: bytes per second.
    """
    source = jnp.zeros(megabytes * 2**18, jnp.float32)
    copy = jax.jit(lambda x: x + 1.0)
    copy(source).block_until_ready()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        copy(source).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * source.nbytes / float(np.median(times))


def figures(
    model: Gemma4,
    batch: int,
    length: int,
    cache: str,
    seconds: float,
    bandwidth: float | None = None,
) -> dict[str, Any]:
    """Returns what a step of `seconds` makes: tokens/s, bytes a token, the share of the least time that bytes allow.

    `bandwidth`: that of a copy in bytes/s where it is known; else one is measured.
    Keys: tokens_per_second, bytes_per_token, bytes (a `Traffic`), copy_bandwidth (bytes/s), roofline_share.
    """
    read = traffic(model, batch, length, cache)
    bandwidth = copy_bandwidth() if bandwidth is None else bandwidth
    return {
        "tokens_per_second": batch / seconds,
        "bytes_per_token": read.total / batch,
        "bytes": read,
        "copy_bandwidth": bandwidth,
        "roofline_share": read.total / bandwidth / seconds,
    }
