"""A plan as data: what is printed, and what is saved as JSON."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Iterable, Sequence
from typing import Any

from gemma_qat.plan.chips import GIB, Topology
from gemma_qat.plan.compile import compile_step, has_compiler
from gemma_qat.plan.estimate import Estimate, Place, declared_flops, estimate, model_flops
from gemma_qat.plan.gpus import DEFAULT_FRACTION, FRACTION, Cluster
from gemma_qat.plan.program import Workload
from gemma_qat.plan.roofline import Roofline, roofline


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What one step of a workload takes on a topology.

    `how`: "compiled" by the TPU compiler, "refused" by it (the program needs more HBM than the chip has), or
    "estimated" from `eval_shape`. Units: bytes per device; FLOPs and seconds per device and step; `mfu` of peak.
    `memory` has `argument`, `output`, `temporary` and `peak` where compiled, parts by name where estimated, and always
    `peak` and `available`.
    """

    name: str
    size: str
    recipe: str
    loss: str
    topology: str
    devices: int
    mesh: dict[str, Any]
    batch_size: int
    length: int
    dtype: str
    remat: str
    how: str
    fits: bool
    memory: dict[str, float]
    model_flops: float
    """Of the step, over all devices."""
    flops: float
    declared_flops: float
    """What the model's declarations give for the contractions of one device (`estimate.declared_flops`)."""
    flops_ratio: float
    """Compiled contractions, on integers too, over declared ones; 1 where estimated."""
    int8_operations: float
    hbm_bytes: float
    collectives: dict[str, dict[str, float]]
    seconds: dict[str, float]
    """`compute`, `memory`, `chip`, `wires`, and the step's `best` and `worst`."""
    limit: str
    mfu: dict[str, float]
    """At `best` and at `worst`."""
    tokens_per_second: float
    """At best, over all devices."""
    quick: bool = False
    lower_seconds: float = 0.0
    compile_seconds: float = 0.0
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Returns it as plain values."""
        return dataclasses.asdict(self)


def plan(
    workload: Workload, topology: Place, *, compiles: bool | None = None, quick: bool = False
) -> Plan:
    """Returns the plan of a workload: for TPUs compiled where their compiler is installed, estimated elsewhere.

    `compiles` False estimates in any case; `quick` as in `compile_step`.
    Raises: InputError when mesh and topology do not fit.
    """
    rough = estimate(workload, topology)
    if isinstance(topology, Cluster):
        return _estimated(workload, topology, rough, _of_gpus(topology, rough.peak))
    if compiles is False or not has_compiler():
        why = "asked for" if compiles is False else "package libtpu (extra tpu) is not installed"
        note = f"estimated from eval_shape, not compiled: {why}"
        return _estimated(workload, topology, rough, (note, *_between(topology)))
    program = compile_step(workload, topology, quick=quick)
    if program.refusal:
        note = f"the compiler refused: {program.refusal}"
        refused = _estimated(
            workload, topology, rough, (note, "time and parts are estimated from eval_shape")
        )
        memory = refused.memory | {"peak": program.needed or refused.memory["peak"]}
        return dataclasses.replace(
            refused, how="refused", fits=False, memory=memory, lower_seconds=program.lower_seconds,
            compile_seconds=program.compile_seconds, quick=quick,
        )  # fmt: skip
    bound = roofline(program, topology)
    memory = {
        "argument": program.argument, "output": program.output, "temporary": program.temporary,
        "alias": program.alias, "code": program.code, "peak": program.peak,
        "available": topology.hbm, "estimated peak": rough.peak,
    }  # fmt: skip
    return dataclasses.replace(
        _from_bound(workload, topology, bound), how="compiled", fits=True, memory=memory,
        lower_seconds=program.lower_seconds, compile_seconds=program.compile_seconds, quick=quick,
    )  # fmt: skip


def _of_gpus(cluster: Cluster, peak: float) -> tuple[str, ...]:
    """What there is to say of an estimate for GPUs."""
    notes = [
        "an estimate for GPUs from eval_shape, at peak rates and not compiled: what XLA keeps besides is not counted"
    ]
    least = cluster.gpu.hbm * DEFAULT_FRACTION
    if least < peak <= cluster.hbm:
        notes.append(
            f"XLA_PYTHON_CLIENT_MEM_FRACTION={FRACTION} is needed, as the launchers set it: by default XLA takes "
            f"{least / GIB:.1f} GiB of a GPU"
        )
    return tuple(notes)


def _from_bound(workload: Workload, topology: Topology, bound: Roofline) -> Plan:
    seconds = {
        "compute": bound.compute_seconds, "memory": bound.memory_seconds, "chip": bound.chip_seconds,
        "wires": bound.wire_seconds, "best": bound.best, "worst": bound.worst,
    }  # fmt: skip
    found = _plan(
        workload, topology, seconds, flops=bound.work.flops, int8=bound.work.int8,
        hbm=bound.work.bytes, collectives=bound.collectives, limit=bound.limit, notes=(),
    )  # fmt: skip
    notes = doubts(found.flops_ratio, bound.unknown_loops, remat=workload.options.remat)
    return dataclasses.replace(found, notes=(*notes, *_partial(workload), *_between(topology)))


def _between(topology: Topology) -> tuple[str, ...]:
    """What there is to say of several slices."""
    if topology.slices == 1:
        return ()
    return (
        "what slices send one another is timed as if they were one: the data-center network is slower",
    )


TRUSTED = 0.03
"""How far compiled contractions may be from declared ones before a plan says so."""


def _partial(workload: Workload) -> tuple[str, ...]:
    """What there is to say of a step in which not everything trains."""
    if not workload.lora.rank and not workload.train.only:
        return ()
    return (
        "not everything trains: declared and model FLOPs count the gradient of every matrix, more than is done",
    )


def doubts(
    ratio: float, unknown_loops: Sequence[str] = (), *, remat: str = "full"
) -> tuple[str, ...]:
    """Returns what speaks against the count of a compiled program's FLOPs.

    With `remat` other than "none" and "full" the declared count is an upper bound: fewer say nothing.
    """
    notes = []
    if unknown_loops:
        notes.append(
            f"{len(unknown_loops)} loops of unknown turns (first {unknown_loops[0]}), counted once"
        )
    if ratio > 1 + TRUSTED or (ratio < 1 - TRUSTED and remat in ("none", "full")):
        notes.append(
            f"contractions of the compiled program are {ratio:.3f} of the declared ones: either the partitioner "
            "repeats or drops work, or a loop is misread"
        )
    return tuple(notes)


def _estimated(
    workload: Workload, topology: Place, rough: Estimate, notes: tuple[str, ...]
) -> Plan:
    seconds = {
        "compute": rough.compute_seconds, "wires": rough.wire_seconds, "best": rough.seconds,
        "worst": rough.compute_seconds + rough.wire_seconds,
    }  # fmt: skip
    limit = "arithmetic" if rough.compute_seconds >= rough.wire_seconds else "wires"
    out = _plan(
        workload, topology, seconds, flops=rough.flops, int8=0.0, hbm=0.0,
        collectives={"all": {"count": 0.0, "bytes": rough.wire_bytes, "seconds": rough.wire_seconds}},
        limit=limit, notes=notes,
    )  # fmt: skip
    memory = rough.parts | {"peak": rough.peak, "available": topology.hbm}
    return dataclasses.replace(out, memory=memory, fits=rough.peak <= topology.hbm)


def _plan(
    workload: Workload,
    topology: Place,
    seconds: dict[str, float],
    *,
    flops: float,
    int8: float,
    hbm: float,
    collectives: dict[str, dict[str, float]],
    limit: str,
    notes: Iterable[str],
) -> Plan:
    asked, declared = model_flops(workload), declared_flops(workload) / topology.devices
    peak = topology.flops * topology.devices
    mesh = {k: v for k, v in dataclasses.asdict(workload.mesh).items() if v != 1}
    return Plan(
        name=workload.name, size=workload.config.name, recipe=workload.recipe, loss=workload.train.loss,
        topology=topology.name, devices=topology.devices, mesh=mesh, batch_size=workload.train.batch_size,
        length=workload.length, dtype=workload.options.dtype, remat=workload.options.remat,
        how="estimated", fits=False, memory={}, model_flops=asked, flops=flops, declared_flops=declared,
        flops_ratio=(flops + int8) / declared, int8_operations=int8,
        hbm_bytes=hbm, collectives=collectives, seconds=seconds, limit=limit,
        mfu={key: asked / peak / seconds[key] for key in ("best", "worst")},
        tokens_per_second=workload.tokens / seconds["best"], versions=_versions(), notes=tuple(notes),
    )  # fmt: skip


def _versions() -> dict[str, str]:
    """Of the compiler and what stands before it; libtpu's only where it is installed."""
    names = ("jax", "jaxlib", "libtpu") if has_compiler() else ("jax", "jaxlib")
    return {name: importlib.metadata.version(name) for name in names}


def verdict(plan: Plan) -> str:
    """Returns one line: whether it fits, and by how much or how much not."""
    peak, available = plan.memory["peak"] / GIB, plan.memory["available"] / GIB
    if plan.fits:
        return f"fits: {peak:.2f} of {available:.2f} GiB, {available - peak:.2f} GiB free"
    return f"does not fit: {peak:.2f} of {available:.2f} GiB, {peak - available:.2f} GiB too much"
