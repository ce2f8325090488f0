"""One step on a machine that is rented, or on this one: memory against what a device has, seconds at best and worst."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax

from gemma_qat.errors import InputError
from gemma_qat.launch.machines import Machine
from gemma_qat.plan import Topology, Workload, declared_flops, forecast, has_compiler, plan
from gemma_qat.plan.compile import topology_devices
from gemma_qat.sharding import MeshConfig, batch_share, make_mesh
from gemma_qat.train.speed import PEAK_FLOPS

SLACK = 1.8
"""How far over the compiler's figure estimates were: 1.75 at most of 19 programs (experiments/scaling/rows)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """What a step takes.

    `how`: compiled, refused (by the compiler) or estimated. Units: bytes of one device, seconds. `memory` by part;
    `available` and the seconds are None where they are not known. Best and worst are a bound at peak rates, messages
    all hidden and none.
    """

    how: str
    memory: dict[str, float]
    peak: float
    available: float | None
    best: float | None
    worst: float | None
    held: float = 0.0
    """Bytes of what is there between steps, of an estimate; exact."""
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether a device has what it takes; True where that is not known."""
        return self.how != "refused" and (self.available is None or self.peak <= self.available)

    @property
    def may_fit(self) -> bool:
        """Whether it is only estimated, and by no more over than estimates were found to be."""
        if self.how != "estimated" or self.available is None:
            return self.fits
        return self.held <= self.available and self.peak <= SLACK * self.available


def step_on(work: Workload, machine: Machine, compiles: bool | None = None) -> Step:
    """Returns what a step takes on a machine: for TPUs compiled quickly where their compiler is, else estimated.

    Raises: InputError when the mesh does not fit the machine.
    """
    try:
        found = plan(work, machine.place, compiles=compiles, quick=True)
    except jax.errors.JaxRuntimeError as error:
        said = " ".join(str(error).split())[:200]
        estimated = step_on(work, machine, compiles=False)
        notes = (f"the TPU compiler failed, so this is an estimate: {said}", *estimated.notes)
        return dataclasses.replace(estimated, notes=notes)
    parts = {name: size for name, size in found.memory.items() if name not in ("peak", "available")}
    if found.how == "compiled":
        parts = {"estimate": found.memory["estimated peak"]}
    notes = found.notes
    if found.how == "compiled":
        notes = (f"compiled quickly, in {found.compile_seconds:.0f} s", *notes)
    return Step(
        how=found.how, memory=parts, peak=found.memory["peak"],
        available=found.memory["available"], best=found.seconds["best"],
        worst=found.seconds["worst"], held=_held(parts), notes=notes,
    )  # fmt: skip


def refuse_slices(mesh: MeshConfig, machine: Machine) -> None:
    """Refuses a mesh that joins another number of TPU slices than there are.

    Raises: InputError.
    """
    place = machine.place
    if isinstance(place, Topology) and mesh.slices != place.slices:
        raise InputError(
            f"mesh.dcn_data={mesh.dcn_data} mesh.dcn_fsdp={mesh.dcn_fsdp}: {mesh.slices} slices of {place.slice_name} "
            f"wanted, {place.slices} there (--slices)"
        )


def check_hosts(mesh: MeshConfig, machine: Machine) -> None:
    """Refuses a mesh on which hosts would hold shares of a batch that overlap; where TPUs lie, their compiler knows.

    Raises: InputError.
    """
    devices: list[Any] = []
    if isinstance(machine.place, Topology):
        devices = topology_devices(machine.place) if has_compiler() else []
    else:
        devices = [_Gpu(n, n // machine.chips_per_host) for n in range(machine.place.devices)]
    if machine.hosts > 1 and devices:
        batch_share(make_mesh(mesh, devices), 0)


@dataclasses.dataclass(frozen=True, eq=False)
class _Gpu:
    """A device that is not there, as a mesh is laid out of: consecutive ones share a host."""

    id: int
    process_index: int
    platform: str = "gpu"
    device_kind: str = "gpu"


def step_here(work: Workload, mesh: Any) -> Step:
    """Returns the estimate of a step on a mesh of this machine's devices, as `train` would use them."""
    parts, device = forecast(work, mesh), jax.local_devices()[0]
    available = (device.memory_stats() or {}).get("bytes_limit")
    notes = ["estimated from eval_shape, not compiled: no --on"]
    if available is None and device.platform == "cpu":
        available = _host_memory() / jax.local_device_count()
        notes.append("a CPU has the host's memory, whoever else uses it")
    peak = PEAK_FLOPS.get(device.device_kind)
    best = declared_flops(work) / mesh.size / peak if peak else None
    if best is not None:
        notes.append("seconds are of arithmetic alone, at peak")
    return Step(
        how="estimated", memory=dict(parts), peak=sum(parts.values()), available=available,
        best=best, worst=best, held=_held(parts), notes=tuple(notes),
    )  # fmt: skip


def _held(parts: Mapping[str, float]) -> float:
    return sum(parts.get(name, 0.0) for name in ("parameters", "optimizer", "teacher"))


def _host_memory() -> float:
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
