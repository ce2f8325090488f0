"""Tries batch x remat x mesh and ranks what fits: arithmetic prunes, the compiler decides.

Every combination is estimated (`estimate.py`); those that the estimate puts far beyond the chip's HBM are dropped, the
others are ranked by tokens per second, and the best few are compiled. The estimate of activations is rough, so what it
puts up to `SLACK` times the HBM stays in.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

from gemma_qat.errors import InputError
from gemma_qat.models import ModelConfig
from gemma_qat.nn.stack import Remat
from gemma_qat.plan.estimate import Estimate, Place, estimate, held_bytes, model_flops
from gemma_qat.plan.program import Workload
from gemma_qat.plan.report import Plan, plan
from gemma_qat.sharding import MESH_AXES, PRESETS, MeshConfig

SLACK = 1.15
ROWS = (1, 2, 4, 8, 16)
"""Rows per device that are tried."""

REMATS: tuple[Remat, ...] = ("none", "full")

Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class Choice:
    """One combination: its estimate, and its plan if it was among those compiled."""

    workload: Workload
    estimate: Estimate
    topology: Place
    plan: Plan | None = None

    @property
    def mfu(self) -> float:
        """At best, by the plan, or else by the estimate."""
        if self.plan is not None:
            return self.plan.mfu["best"]
        peak = self.topology.flops * self.topology.devices
        return model_flops(self.workload) / peak / self.estimate.seconds

    @property
    def tokens_per_second(self) -> float:
        """By the plan, or else by the estimate."""
        if self.plan is not None:
            return self.plan.tokens_per_second
        return self.workload.tokens / self.estimate.seconds

    def row(self) -> dict[str, Any]:
        """Returns it as plain values: a row of the ranking."""
        mesh, plan = self.workload.mesh, self.plan
        sizes = {axis: getattr(mesh, axis) for axis in MESH_AXES}
        return {
            "mesh": " ".join(
                [f"{mesh.preset}:", *(f"{a} {n}" for a, n in sizes.items() if n != 1)]
            ),
            "batch_size": self.workload.train.batch_size,
            "remat": self.workload.options.remat,
            "peak": self.estimate.peak if plan is None else plan.memory["peak"],
            "seconds": self.estimate.seconds if plan is None else plan.seconds["best"],
            "mfu": self.mfu,
            "tokens_per_second": self.tokens_per_second,
            "how": "estimated" if plan is None else plan.how,
        }


def candidates(workload: Workload, topology: Place) -> Iterator[Choice]:
    """Yields the workload with every batch, remat and mesh that is worth trying, estimated."""
    for mesh in _meshes(workload.config, topology.devices):
        held = held_bytes(dataclasses.replace(workload, mesh=mesh), topology)
        for remat, rows in itertools.product(REMATS, ROWS):
            one = dataclasses.replace(
                workload, mesh=mesh, options=dataclasses.replace(workload.options, remat=remat),
                train=dataclasses.replace(workload.train, batch_size=rows * mesh.data * mesh.fsdp * mesh.expert),
            )  # fmt: skip
            yield Choice(one, estimate(one, topology, held), topology)


def _meshes(config: ModelConfig, devices: int) -> Iterator[MeshConfig]:
    yield MeshConfig(preset="fsdp", fsdp=devices)
    for data in (2, 4, 8):
        if devices % data == 0 and devices > data:
            yield MeshConfig(preset="fsdp", data=data, fsdp=devices // data)
    for preset, axis in (("fsdp+tensor", "tensor"), ("fsdp+expert", "expert")):
        if preset not in PRESETS or (axis == "expert" and config.experts is None):
            continue
        for size in (2, 4, 8):
            if devices % size == 0:
                split = {axis: size, "fsdp": devices // size}
                yield MeshConfig(preset=preset, **split)


def search(
    workload: Workload,
    topology: Place,
    *,
    best: int = 3,
    compiles: bool | None = None,
    progress: Progress | None = None,
) -> list[Choice]:
    """Returns the combinations that fit, fastest first; those compiled before those only estimated.

    `best` is how many are compiled (0: none), quickly. Raises: InputError when nothing fits.
    """
    rough = list(candidates(workload, topology))
    kept = [c for c in rough if c.estimate.peak <= SLACK * topology.hbm]
    if not kept:
        least = min(rough, key=lambda c: c.estimate.peak)
        raise InputError(
            f"{workload.name} does not fit {topology.name} in any combination: at least "
            f"{least.estimate.peak / 2**30:.1f} GiB a chip estimated"
        )
    kept.sort(key=lambda c: (-c.tokens_per_second, c.estimate.peak))
    done: list[Choice] = []
    rest = kept
    while rest and compiles is not False and sum(_fits(c) for c in done) < best:
        first, rest = rest[0], rest[1:]
        done.append(
            dataclasses.replace(
                first, plan=plan(first.workload, topology, compiles=compiles, quick=True)
            )
        )
        if progress is not None:
            progress("compile", len(done), min(best, len(kept)))
        if len(done) >= 2 * best:
            break
    fitting = [c for c in rest if c.estimate.peak <= topology.hbm]
    return sorted(filter(_fits, done), key=lambda c: -c.tokens_per_second) + fitting


def _fits(choice: Choice) -> bool:
    return choice.plan is not None and choice.plan.fits
