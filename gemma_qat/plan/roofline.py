"""How fast a compiled step can be on a chip: a bound from what it has to multiply, read and send.

    arithmetic   bfloat16 passes / peak + int8 operations / int8 peak
    memory       bytes of HBM / bandwidth
    chip         the sum over instructions of the larger of the two: one instruction runs at a time
    wires        the sum over collectives of their time (`exchange.py`)

    step, at best    max(chip, wires): every message hidden behind arithmetic
    step, at worst   chip + wires: none hidden

Assumed: peak rates of the chip for every contraction however small, HBM at full bandwidth, no latency of launches, hops
or the host, input data there in time. Real steps are slower; what the bound says reliably is which of the three is the
limit, and how two settings compare. MFU is model FLOPs (`models/account.py`) over peak and time, so recomputation and
what the mask hides lower it.
"""

from __future__ import annotations

import dataclasses

from gemma_qat.compiled import Module, collectives, executed, parse, summary
from gemma_qat.plan.chips import Topology
from gemma_qat.plan.compile import Compiled
from gemma_qat.plan.exchange import seconds
from gemma_qat.plan.work import Work, work


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roofline:
    """The bound of one step on one device.

    Units: FLOPs, bytes and seconds per device and step. `collectives` by kind: `count`, `bytes` (whole messages, as one
    device sees them), `seconds`. `unknown_loops` are loops whose turns could not be read, counted once.
    """

    work: Work
    collectives: dict[str, dict[str, float]]
    compute_seconds: float
    memory_seconds: float
    chip_seconds: float
    wire_seconds: float
    unknown_loops: tuple[str, ...] = ()

    @property
    def best(self) -> float:
        """Seconds of a step with every message hidden."""
        return max(self.chip_seconds, self.wire_seconds)

    @property
    def worst(self) -> float:
        """Seconds of a step with no message hidden."""
        return self.chip_seconds + self.wire_seconds

    @property
    def limit(self) -> str:
        """What bounds the step at best."""
        if self.wire_seconds > self.chip_seconds:
            return "wires"
        return "arithmetic" if self.compute_seconds >= self.memory_seconds else "memory"


def roofline(compiled: Compiled, topology: Topology) -> Roofline:
    """Returns the bound of a compiled program."""
    module = parse(compiled.text)
    runs = executed(module)
    chip, total, busy = topology.chip, Work(), 0.0
    for name, count in runs.times.items():
        computation = module.computations[name]
        for instruction in computation.values():
            one = work(module, computation, instruction)
            total += one.times(count)
            busy += count * max(_arithmetic(one, topology), one.bytes / chip.bandwidth)
    rows = _sent(module, compiled, topology)
    return Roofline(
        work=total, collectives=rows, compute_seconds=_arithmetic(total, topology),
        memory_seconds=total.bytes / chip.bandwidth, chip_seconds=busy,
        wire_seconds=sum(row["seconds"] for row in rows.values()), unknown_loops=runs.unknown,
    )  # fmt: skip


def _sent(module: Module, compiled: Compiled, topology: Topology) -> dict[str, dict[str, float]]:
    messages = collectives(module)
    rows = summary(messages)
    for kind, row in rows.items():
        row["seconds"] = sum(
            one.count * seconds(one, topology, compiled.coordinates)
            for one in messages
            if one.kind == kind
        )
    return rows


def _arithmetic(one: Work, topology: Topology) -> float:
    return one.passes / topology.chip.flops + one.int8 / topology.chip.int8
