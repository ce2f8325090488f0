"""How long what a compiled program sends between TPU chips takes on the wires.

Time of one message of `b` bytes (the whole array, as one device sees it) among n chips, w the bandwidth into a chip
over the links the group has:

    all-gather, reduce-scatter   b (n - 1) / n / w          all-reduce            twice that
    collective-permute           b / link                   all-to-all            max(b / w, b d / (8 link))

w is `link` times two for each dimension of the torus that the group fills and that closes to a ring, times one for a
dimension it fills in part or that does not close. d is the longest such dimension: half of all bytes cross its middle.

Source: jax-ml.github.io/scaling-book, "Sharded matrices and how to multiply them"; latency of single hops is left out.
"""

from __future__ import annotations

from collections.abc import Sequence

from gemma_qat.compiled import Collective
from gemma_qat.plan.chips import Topology


def seconds(
    message: Collective, topology: Topology, coordinates: Sequence[tuple[int, ...]]
) -> float:
    """Returns how long one execution takes; `coordinates` say where each device lies on the torus."""
    n, size = len(message.group), message.bytes
    if n < 2:
        return 0.0
    spans = _spans(topology, [coordinates[i] for i in message.group])
    link = topology.chip.link
    into = link * sum(links for _, links in spans)
    if message.kind == "collective-permute":
        return size / link
    if message.kind.endswith("all-to-all"):
        return max(size / into, size * max(d for d, _ in spans) / (8 * link))
    rounds = 2 if message.kind == "all-reduce" else 1
    return rounds * size * (n - 1) / n / into


def _spans(topology: Topology, places: list[tuple[int, ...]]) -> list[tuple[int, int]]:
    """Returns, for each torus dimension a group spreads over, (its extent, links per chip)."""
    found = []
    for axis, length in enumerate(topology.shape):
        extent = len({place[axis] for place in places})
        if extent > 1:
            is_ring = extent == length and topology.chip.closes(length)
            found.append((extent, 2 if is_ring else 1))
    return found or [(1, 1)]
