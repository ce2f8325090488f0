"""Machines by one name, whoever rents them out: `v5p:4x4x4` is a TPU slice, `h100:4x8` four nodes of eight GPUs.

    name       a host has                GKE's node label               GKE's machine type
    v5p        4 chips                   tpu-v5p-slice                  ct5p-hightpu-4t
    v5e        1, 4 or 8; of several 4   tpu-v5-lite-podslice           ct5lp-hightpu-1t, -4t, -8t
    v6e        1, 4 or 8; of several 4   tpu-v6e-slice                  ct6e-standard-1t, -4t, -8t
    a100       as named                  nvidia-a100-80gb               a2-ultragpu-1g, -2g, -4g, -8g
    h100       as named                  nvidia-h100-80gb               a3-highgpu-1g, -2g, -4g, -8g
    h200       as named                  nvidia-h200-141gb              a3-ultragpu-8g
    b200       as named                  nvidia-b200                    a4-highgpu-8g

Sources: docs.cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus, docs.cloud.google.com/compute/docs/gpus.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from gemma_qat.errors import InputError, unknown
from gemma_qat.plan import CHIPS, GPUS, Cluster, Topology, cluster_named, topology_named


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rented:
    """What one kind of chip is called where it is rented; `types` by how many chips a host has."""

    label: str
    types: Mapping[int, str]


RENTED: dict[str, Rented] = {
    "v5p": Rented(label="tpu-v5p-slice", types={4: "ct5p-hightpu-4t"}),
    "v5e": Rented(
        label="tpu-v5-lite-podslice", types={n: f"ct5lp-hightpu-{n}t" for n in (1, 4, 8)}
    ),
    "v6e": Rented(label="tpu-v6e-slice", types={n: f"ct6e-standard-{n}t" for n in (1, 4, 8)}),
    "a100": Rented(label="nvidia-a100-80gb", types={n: f"a2-ultragpu-{n}g" for n in (1, 2, 4, 8)}),
    "h100": Rented(label="nvidia-h100-80gb", types={n: f"a3-highgpu-{n}g" for n in (1, 2, 4, 8)}),
    "h200": Rented(label="nvidia-h200-141gb", types={8: "a3-ultragpu-8g"}),
    "b200": Rented(label="nvidia-b200", types={8: "a4-highgpu-8g"}),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """The hosts of one run, all alike."""

    place: Topology | Cluster
    hosts: int
    chips_per_host: int

    @property
    def name(self) -> str:
        """As it was asked for, such as v5p:4x4x4."""
        return self.place.name

    @property
    def chip(self) -> str:
        """The kind of chip, such as v5p or h100."""
        return self.place.chip.name if isinstance(self.place, Topology) else self.place.gpu.name

    @property
    def is_tpu(self) -> bool:
        """Whether its chips are TPUs."""
        return isinstance(self.place, Topology)

    @property
    def topology(self) -> str:
        """The shape of a TPU slice, such as 4x4x4; empty for GPUs."""
        return "x".join(map(str, self.place.shape)) if isinstance(self.place, Topology) else ""

    @property
    def accelerator_type(self) -> str:
        """What TPU VMs call the slice, such as v5p-128; empty for GPUs."""
        return self.place.accelerator_type if isinstance(self.place, Topology) else ""

    @property
    def label(self) -> str:
        """GKE's name of the accelerator, which nodes are chosen by."""
        return RENTED[self.chip].label

    @property
    def node_selector(self) -> dict[str, str]:
        """Which of GKE's nodes its hosts are."""
        place = "cloud.google.com/gke-"
        if self.is_tpu:
            return {f"{place}tpu-accelerator": self.label, f"{place}tpu-topology": self.topology}
        return {f"{place}accelerator": self.label}

    @property
    def resource(self) -> str:
        """What Kubernetes counts its chips as."""
        return "google.com/tpu" if self.is_tpu else "nvidia.com/gpu"

    @property
    def machine_type(self) -> str:
        """Google Cloud's machine type of one host.

        Raises: InputError when none has so many chips of this kind.
        """
        types = RENTED[self.chip].types
        if self.chips_per_host not in types:
            raise InputError(
                f"{self.name}: no machine type of Google Cloud has {self.chips_per_host} {self.chip}; there are hosts "
                f"of {', '.join(map(str, types))}"
            )
        return types[self.chips_per_host]


def machine_named(name: str, slices: int = 1) -> Machine:
    """Returns the machine `name`: a TPU slice such as v5p:4x4x4, so many of it, or nodes x GPUs such as h100:4x8.

    Raises: InputError naming the nearest chips, slices, or how a cluster is written.
    """
    if slices < 1:
        raise InputError(f"{slices} slices: at least one expected")
    chip = name.partition(":")[0]
    if chip in GPUS:
        if slices > 1:
            raise InputError(f"{name}: only TPUs have slices; name more nodes instead")
        cluster = cluster_named(name)
        return Machine(place=cluster, hosts=cluster.nodes, chips_per_host=cluster.per_node)
    if chip not in CHIPS:
        raise unknown("chip", chip, [*CHIPS, *GPUS])
    place = topology_named(name)
    per_host = 4 if place.devices > 8 or chip == "v5p" else place.devices
    if place.devices % per_host:
        raise InputError(f"{name}: hosts have {per_host} chips, the slice {place.devices}")
    place = dataclasses.replace(place, slices=slices)
    return Machine(place=place, hosts=place.devices // per_host, chips_per_host=per_host)
