"""How much work each instruction of a compiled program is: FLOPs of its contractions, bytes it moves to and from HBM.

FLOPs are counted where XLA for TPU puts contractions: `convolution` (every einsum becomes one, batch axes as spatial
dimensions with a window), `dot`, and the kernels of products with experts. Elementwise work is left out: a vector unit
does it while data streams past. Of a convolution only the pairs of output and window positions that meet a real element
count, as in XLA's own analysis: padding and dilation are how batch axes are written, not work.

Bytes are what an instruction reads and writes in HBM. What the compiler keeps on the chip (memory space S(1)) is free;
of an array that is only sliced, the slice counts, and of one that is updated in place, the update.

Source: `HloCostAnalysis` in openxla/xla, whose counts these equal for contractions (a test compares them).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterable

from gemma_qat.compiled import Computation, Instruction, Module, Shape
from gemma_qat.kernels import tpu_grouped_gradient

_PASSES = {"highest": 6, "high": 3}
"""bfloat16 products that one float32 product is made of, by the precision asked for."""

_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional", "after-all",
    "opt-barrier", "partition-id", "replica-id", "iota",
}  # fmt: skip
_COLLECTIVE = re.compile(r"(all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)")
_GROUPED = ("ragged-dot", tpu_grouped_gradient.NAME)
"""How kernels are called that multiply rows with the matrices of their experts."""
_UNREAD = {"AllocateBuffer", "AssumeGatherIndicesInBound", "AsyncCollectiveStart", "AsyncCollectiveDone"}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Work:
    """What instructions cost.

    Units: FLOPs as written; `passes` counts each as often as a bfloat16 unit does it (float32 at highest precision: 6);
    `int8` are those on integer codes, not among the others; bytes of HBM.
    """

    flops: float = 0.0
    passes: float = 0.0
    int8: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.flops + other.flops, self.passes + other.passes, self.int8 + other.int8,
            self.bytes + other.bytes,
        )  # fmt: skip

    def times(self, count: int) -> Work:
        """Returns the work of running it `count` times."""
        return Work(self.flops * count, self.passes * count, self.int8 * count, self.bytes * count)


def work(module: Module, within: Computation, instruction: Instruction) -> Work:
    """Returns the work of one instruction, what a fusion holds included; collectives cost nothing here."""
    if _COLLECTIVE.match(instruction.op) or instruction.op in _FREE:
        return Work()
    total = contractions(module, within, instruction)
    return dataclasses.replace(total, bytes=_traffic(module, within, instruction))


def contractions(module: Module, within: Computation, instruction: Instruction) -> Work:
    """Returns the FLOPs of an instruction's contractions, bytes not counted."""
    if instruction.op == "fusion":
        parts = [
            contractions(module, module.computations[name], one)
            for name in instruction.called
            for one in module.computations[name].values()
        ]
        return sum(parts, start=Work())
    operands = [within[name].shapes[0] for name in instruction.operands if name in within]
    flops = _flops(instruction, operands)
    if not flops:
        return Work()
    kinds = {shape.dtype for shape in operands[-2:]}
    if kinds <= {"s8", "u8", "s4", "u4"}:
        return Work(int8=flops)
    asked = set(re.findall(r"high(?:est)?", instruction.attribute("operand_precision") or ""))
    wide = kinds & {"f32", "f64"}
    factor = max([_PASSES[name] for name in asked], default=1) if wide else 1
    return Work(flops=flops, passes=flops * factor)


def _flops(instruction: Instruction, operands: list[Shape]) -> float:
    if instruction.op == "convolution":
        return _convolution(instruction, operands[0], operands[1])
    if instruction.op == "dot":
        reduced = re.findall(r"\d+", instruction.attribute("lhs_contracting_dims") or "")
        inner = math.prod(operands[0].dims[int(axis)] for axis in reduced)
        return 2.0 * math.prod(instruction.shapes[0].dims) * inner
    if instruction.op == "custom-call" and instruction.name.startswith(_GROUPED):
        return _ragged(instruction, operands)
    return 0.0


def _ragged(instruction: Instruction, operands: list[Shape]) -> float:
    """Rows times the matrices of their experts: one array is [E, R, O], another [C, ...] holds the rows."""
    arrays = [*instruction.shapes, *operands]
    rows = [shape.dims[0] for shape in arrays if len(shape.dims) == 2 and shape.dtype != "s32"]
    matrices = [shape.dims for shape in arrays if len(shape.dims) == 3]
    if not rows or not matrices:
        return 0.0  # the kernel that prepares the row ranges
    return 2.0 * rows[0] * matrices[0][1] * matrices[0][2]


def _convolution(instruction: Instruction, lhs: Shape, rhs: Shape) -> float:
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    assert labels is not None
    left, right, out = labels.groups()
    window = _window(instruction.attribute("window") or "{}")
    pairs = 1.0
    for i, size in enumerate(window["size"]):
        base, outs = lhs.dims[left.index(str(i))], instruction.shapes[0].dims[out.index(str(i))]
        pad = int(_get(window["pad"], i, "0_0").split("_")[0])
        pairs *= _meetings(
            outs, int(size), base, int(_get(window["stride"], i, "1")), pad,
            int(_get(window["lhs_dilate"], i, "1")), int(_get(window["rhs_dilate"], i, "1")),
        )  # fmt: skip
    groups = int(instruction.attribute("batch_group_count") or 1)
    batch = lhs.dims[left.index("b")] / groups
    return 2.0 * batch * rhs.dims[right.index("i")] * rhs.dims[right.index("o")] * pairs


def _window(text: str) -> dict[str, list[str]]:
    names = ("size", "stride", "pad", "lhs_dilate", "rhs_dilate")
    found = {name: re.search(rf"\b{name}=([\d_x\-]+)", text) for name in names}
    return {name: one.group(1).split("x") if one else [] for name, one in found.items()}


def _get(values: list[str], index: int, default: str) -> str:
    return values[index] if index < len(values) else default


@functools.lru_cache(maxsize=4096)
def _meetings(
    outs: int, size: int, base: int, stride: int, pad: int, spread: int, window_spread: int
) -> int:
    """Returns how many (output, window) positions meet an element that is neither padding nor a gap of dilation."""
    extent = (base - 1) * spread + 1
    found = 0
    for k in range(size):
        # Position o * stride + offset has to lie in [0, extent) on a multiple of `spread`.
        offset = k * window_spread - pad
        low = max(0, -(offset // stride))
        high = min(outs - 1, (extent - 1 - offset) // stride)
        if spread == 1:
            found += max(0, high - low + 1)
        else:
            found += sum((o * stride + offset) % spread == 0 for o in range(low, high + 1))
    return found


def _traffic(module: Module, within: Computation, instruction: Instruction) -> float:
    if instruction.op == "fusion":
        inside = module.computations[instruction.called[0]]
        return _read(within, instruction, inside) + _written(instruction, inside)
    if _target(instruction) in _UNREAD or instruction.op.endswith("-done"):
        return 0.0
    operands = [within[name].shapes for name in instruction.operands if name in within]
    if instruction.op in ("dynamic-slice", "gather"):
        return 2 * _hbm(instruction.shapes)
    if instruction.op in ("dynamic-update-slice", "scatter") and len(operands) > 1:
        return 2 * _hbm(operands[-1] if instruction.op == "scatter" else operands[1])
    results = instruction.shapes[:1] if instruction.op.endswith("-start") else instruction.shapes
    return _hbm(results) + sum(_hbm(shapes) for shapes in operands)


def _read(within: Computation, fusion: Instruction, inside: Computation) -> float:
    parameters = {int(one.literal): one for one in inside.values() if one.op == "parameter"}
    users: dict[str, list[Instruction]] = {}
    for one in inside.values():
        for name in set(one.operands):
            users.setdefault(name, []).append(one)
    total = 0.0
    for number, name in enumerate(fusion.operands):
        if name not in within or not _hbm(within[name].shapes) or number not in parameters:
            continue
        parameter = parameters[number].name
        parts = [_used(one, parameter, users) for one in users.get(parameter, [])]
        total += min(_hbm(within[name].shapes), sum(parts, 0.0))
    return total


def _used(user: Instruction, name: str, users: dict[str, list[Instruction]]) -> float:
    """Bytes that one user inside a fusion reads of an array."""
    if user.op in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
        return sum((shape.bytes for shape in user.shapes), 0.0)
    updated = user.op in ("dynamic-update-slice", "scatter") and user.operands[0] == name
    if updated or _COLLECTIVE.match(user.op) or _target(user) in _UNREAD or user.op == "tuple":
        return 0.0
    if user.op == "bitcast":
        return sum((_used(one, user.name, users) for one in users.get(user.name, [])), 0.0)
    return math.inf


def _written(fusion: Instruction, inside: Computation) -> float:
    root = next(one for one in inside.values() if one.is_root)
    if _target(root) in _UNREAD:
        return 0.0  # the message itself: its time is on the wires
    parts = [inside[name] for name in root.operands] if root.op == "tuple" else [root]
    if len(parts) != len(fusion.shapes):
        return _hbm(fusion.shapes)
    total = 0.0
    for part, shape in zip(parts, fusion.shapes, strict=True):
        if not shape.in_hbm or part.op == "parameter" or _COLLECTIVE.match(part.op):
            continue
        in_place = part.op == "dynamic-update-slice" and part.operands[1] in inside
        total += sum(s.bytes for s in inside[part.operands[1]].shapes) if in_place else shape.bytes
    return total


def _target(instruction: Instruction) -> str:
    return (instruction.attribute("custom_call_target") or "").strip('"')


def _hbm(shapes: Iterable[Shape]) -> float:
    return sum((shape.bytes for shape in shapes if shape.in_hbm), 0.0)
