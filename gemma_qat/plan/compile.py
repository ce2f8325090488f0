"""Compiles a step for chips that are not there, and reads what the compiler says of it.

A quick compilation asks the compiler to spend little on the speed of the program (`exec_time_optimization_effort` -1):
schedule and fusions are less refined, in a fifth of the time. Two layers of 31B width, against full effort: FLOPs
within 0.02 %, peak 5 % lower (docs/scaling.md).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import re
import time
from typing import Any

import jax
from jax.experimental import topologies

from gemma_qat.errors import InputError
from gemma_qat.plan.chips import GIB, Topology
from gemma_qat.plan.program import Workload, lower
from gemma_qat.sharding import make_mesh


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """A program for one device of the topology, or the compiler's refusal.

    Units: bytes of HBM per device, seconds of this machine. `needed` is what a refused program asked for.
    """

    text: str = ""
    argument: int = 0
    output: int = 0
    alias: int = 0
    temporary: int = 0
    code: int = 0
    peak: int = 0
    needed: float = 0.0
    refusal: str = ""
    xla_flops: float = 0.0
    """XLA's own count, loops once."""
    lower_seconds: float = 0.0
    compile_seconds: float = 0.0
    coordinates: tuple[tuple[int, ...], ...] = ()
    """Of each device on the torus, in the mesh's order."""


_QUICK = {"exec_time_optimization_effort": -1.0}


def has_compiler() -> bool:
    """Returns whether the TPU compiler (package libtpu, extra `tpu`) is installed."""
    # A folder that happens to be called so is found too, without an origin.
    found = importlib.util.find_spec("libtpu")
    return found is not None and found.origin is not None


def topology_devices(topology: Topology) -> list[Any]:
    """Returns descriptions of the devices of a topology; none of them is there.

    Raises: InputError with the compiler's words when it knows no such topology.
    """
    try:
        several: dict[str, Any] = {"num_slices": topology.slices} if topology.slices > 1 else {}
        if math.prod(topology.shape) == 1:
            several["chips_per_host_bounds"] = [1, 1, 1]  # The default is hosts of four.
        return list(
            topologies.get_topology_desc(
                platform="tpu", topology_name=topology.slice_name, **several
            ).devices
        )
    except jax.errors.JaxRuntimeError as error:
        raise InputError(f"{topology.name}: {error}") from None


def compile_step(workload: Workload, topology: Topology, *, quick: bool = False) -> Compiled:
    """Returns the step compiled for a topology by the TPU compiler.

    Raises: InputError when the mesh does not fit the topology; what else goes wrong in the compiler is passed on.
    """
    mesh = make_mesh(workload.mesh, topology_devices(topology))
    places = tuple(tuple(device.coords) for device in mesh.devices.reshape(-1))
    began = time.monotonic()
    lowered = lower(workload, mesh)
    between = time.monotonic()
    try:
        program = lowered.compile(compiler_options=_QUICK if quick else {})
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _refused(str(error), between - began, time.monotonic() - between, places)
    memory, cost = program.memory_analysis(), program.cost_analysis()
    return Compiled(
        text=program.as_text(), argument=memory.argument_size_in_bytes, output=memory.output_size_in_bytes,
        alias=memory.alias_size_in_bytes, temporary=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes, peak=memory.peak_memory_in_bytes,
        xla_flops=float(cost.get("flops", 0.0)), lower_seconds=between - began,
        compile_seconds=time.monotonic() - between, coordinates=places,
    )  # fmt: skip


_SIZE = re.compile(r"([\d.]+)([KMGT]?)")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}


def _refused(
    message: str, lowering: float, compiling: float, places: tuple[tuple[int, ...], ...]
) -> Compiled:
    first = " ".join(message.split())[:400]
    return Compiled(
        needed=needed_bytes(message), refusal=first, lower_seconds=lowering, compile_seconds=compiling,
        coordinates=places,
    )  # fmt: skip


def needed_bytes(message: str) -> float:
    """Returns the bytes that a program asked for, from the compiler's refusal; 0 when it does not say.

    Source: "Used 20.32G of 15.75G hbm" and "memory required for HLO temporaries (595.79G) exceeds" of libtpu 0.0.42.
    """
    for pattern in (r"Used ([\d.]+[KMGT]?) of [\d.]+[KMGT]? hbm", r"\(([\d.]+[KMGT]?)\) exceeds"):
        found = re.search(pattern, message)
        if found:
            size = _SIZE.match(found.group(1))
            assert size is not None
            return float(size.group(1)) * _UNITS[size.group(2)]
    return 0.0
