"""The GPUs a run can be planned for, and clusters of them by name: `h100:4x8` is four nodes of eight.

Units: bytes, bytes per second and FLOPs per second (bfloat16, dense), per GPU. `link` is one direction of what joins
the GPUs of a node, `network` one direction of a GPU's share of what joins nodes.

    GPU    bf16 TFLOPs   HBM      HBM GBps   NVLink GBps, one direction   network GBps of one GPU
    a100    312           80 GB   2039       300                          25
    h100    989           80 GB   3350       450                          50
    h200    989          141 GB   4800       450                          50
    b200   2250          180 GB   8000       900                          50

XLA takes a share of a GPU's memory for itself when it starts, 75 % unless XLA_PYTHON_CLIENT_MEM_FRACTION says another;
the launchers of this project set .92, which is what is counted as there.

Sources: jax's "GPU memory allocation" (docs.jax.dev); NVIDIA's data sheets of A100 80GB SXM, H100 SXM, H200 SXM and DGX
B200 (dense figures); one 200 Gb/s (A100) or 400 Gb/s adapter a GPU, as NVIDIA's DGX systems have. A slower network
makes a run slower than planned.
"""

from __future__ import annotations

import dataclasses
import re

from gemma_qat.errors import InputError, unknown


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """One kind of GPU; units as above."""

    name: str
    hbm: float
    flops: float
    bandwidth: float
    link: float
    network: float


GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu(name="a100", hbm=80e9, flops=312e12, bandwidth=2039e9, link=300e9, network=25e9),
        Gpu(name="h100", hbm=80e9, flops=989e12, bandwidth=3350e9, link=450e9, network=50e9),
        Gpu(name="h200", hbm=141e9, flops=989e12, bandwidth=4800e9, link=450e9, network=50e9),
        Gpu(name="b200", hbm=180e9, flops=2250e12, bandwidth=8000e9, link=900e9, network=50e9),
    )
}


FRACTION, DEFAULT_FRACTION = 0.92, 0.75
"""Of a GPU's memory that XLA takes, as the launchers set it and unless it is set."""


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Nodes of GPUs, all alike."""

    gpu: Gpu
    nodes: int
    per_node: int

    @property
    def name(self) -> str:
        """Such as h100:4x8."""
        return f"{self.gpu.name}:{self.nodes}x{self.per_node}"

    @property
    def devices(self) -> int:
        """Number of GPUs, each one device of jax."""
        return self.nodes * self.per_node

    @property
    def hbm(self) -> float:
        """Bytes of one GPU that XLA takes, as the launchers set it."""
        return self.gpu.hbm * FRACTION

    @property
    def flops(self) -> float:
        """Of one GPU at its peak, bfloat16."""
        return self.gpu.flops

    def wire_seconds(self, gathered: float, within: float, together: int) -> float:
        """Returns how long one device's messages take: over NVLink, and what crosses nodes over the network too.

        `gathered` are bytes that come from all devices, `within` from those along the tensor axis; `together`
        neighbouring devices hold parts of different matrices (tensor x expert), the others of a node want the same
        bytes and share the network: each takes its part and hands it on. The slower of both, since they overlap.
        """
        inside = (gathered + within) / self.gpu.link if self.per_node > 1 else 0.0
        crossing = gathered / max(self.per_node // together, 1)
        crossing += within if together > self.per_node else 0.0
        outside = crossing * (self.nodes - 1) / self.nodes / self.gpu.network
        return max(inside, outside)


def cluster_named(name: str) -> Cluster:
    """Returns the cluster `name`: a kind of GPU, a colon, nodes x GPUs of a node; h100:8 is one node of eight.

    Raises: InputError naming the nearest kind, or how a cluster is written.
    """
    kind, _, shape = name.partition(":")
    if kind not in GPUS:
        raise unknown("GPU", kind, GPUS)
    found = re.fullmatch(r"(?:([1-9]\d*)x)?([1-9]\d*)", shape)
    if found is None:
        raise InputError(f"{name!r}: nodes x GPUs of a node expected, such as {kind}:4x8")
    return Cluster(GPUS[kind], int(found[1] or 1), int(found[2]))
