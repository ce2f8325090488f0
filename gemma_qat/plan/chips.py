"""The chips a plan can be made for: what each holds and how fast it moves numbers, and topologies by name.

A topology is written as the compiler writes it, chip and shape: `v5p:4x4x4`, `v5e:4x4`, `v6e:16x16`.

Units: bytes, bytes per second, FLOPs per second, all per chip. `link` is one direction of one link; a chip of a 2D
torus has four links, of a 3D torus six, so that the documented bidirectional bandwidth is 2 x links x `link`.

    chip   bf16 TFLOPs   int8 TOPs   HBM       HBM GBps   interconnect, both directions   torus
    v5p    459           918         95 GiB    2765       1200 GBps                       3D
    v5e    197           393         16 GB      819        400 GBps                       2D
    v6e    918           1836        32 GB     1638        800 GBps                       2D

Sources: docs.cloud.google.com/tpu/docs/v5p, /v5e and /v6e, "System architecture" (int8 of v5p: Google's announcement of
the chip, December 2023). `hbm` is what the compiler leaves a program, in its own words when one does not fit ("exceeds
available HBM (95.74G)"). Which dimensions close to a ring: jax-ml.github.io/scaling-book, "How to think about TPUs":
multiples of 4 in a 3D torus, 16 in a 2D one.
"""

from __future__ import annotations

import dataclasses
import math
import re

from gemma_qat.errors import InputError, nearest, unknown
from gemma_qat.train.speed import PEAK_FLOPS

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One kind of chip; units as above."""

    name: str
    hbm: float
    flops: float
    int8: float
    bandwidth: float
    link: float
    dimensions: int
    """Of the torus."""
    accelerator: str
    """Prefix of the accelerator type, which counts cores for v5p and chips for the others."""
    cores: int
    shapes: tuple[str, ...]
    """Slices that can be rented, smallest first."""

    def closes(self, length: int) -> bool:
        """Returns whether a dimension of the torus of this length is a ring."""
        return length % 4 == 0 if self.dimensions == 3 else length == 16


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = (
    "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16",
)  # fmt: skip

CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip(
            name="v5p", hbm=95.74 * GIB, flops=PEAK_FLOPS["TPU v5p"], int8=918e12, bandwidth=2765e9,
            link=100e9, dimensions=3, accelerator="v5p", cores=2, shapes=_CUBES,
        ),
        Chip(
            name="v5e", hbm=15.75 * GIB, flops=PEAK_FLOPS["TPU v5 lite"], int8=393e12, bandwidth=819e9,
            link=50e9, dimensions=2, accelerator="v5litepod", cores=1, shapes=_FLAT,
        ),
        Chip(
            name="v6e", hbm=31.25 * GIB, flops=PEAK_FLOPS["TPU v6 lite"], int8=1836e12, bandwidth=1638e9,
            link=100e9, dimensions=2, accelerator="v6e", cores=1, shapes=_FLAT,
        ),
    )
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Topology:
    """Slices of one run, all alike: which chip, in what shape, how many."""

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def slice_name(self) -> str:
        """One slice as the compiler writes it."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def name(self) -> str:
        """Such as v5p:4x4x4, or 2 x v5p:4x4x4."""
        return f"{self.slices} x {self.slice_name}" if self.slices > 1 else self.slice_name

    @property
    def devices(self) -> int:
        """Number of chips of all slices, each one device of jax."""
        return self.slices * math.prod(self.shape)

    @property
    def hbm(self) -> float:
        """Bytes of one chip."""
        return self.chip.hbm

    @property
    def flops(self) -> float:
        """Of one chip at its peak, bfloat16."""
        return self.chip.flops

    def wire_seconds(self, gathered: float, within: float, together: int) -> float:
        """Returns how long one chip's messages take over the links of the whole torus, however they are split."""
        del together
        into = self.chip.link * sum(2 if self.chip.closes(n) else 1 for n in self.shape if n > 1)
        return (gathered + within) / into if into else 0.0

    @property
    def accelerator_type(self) -> str:
        """Such as v5p-128: what TPU_ACCELERATOR_TYPE is on a machine of the slice."""
        return f"{self.chip.accelerator}-{math.prod(self.shape) * self.chip.cores}"


def topology_named(name: str) -> Topology:
    """Returns the topology `name`, such as v5p:4x4x4.

    Raises: InputError naming the nearest chips or slices.
    """
    chip_name, colon, shape = name.partition(":")
    if chip_name not in CHIPS:
        raise unknown("chip", chip_name, CHIPS)
    chip = CHIPS[chip_name]
    if not colon or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) or shape not in chip.shapes:
        close = nearest(shape, chip.shapes) or ", ".join(chip.shapes)
        close = ", ".join(f"{chip_name}:{one}" for one in close.split(", "))
        raise InputError(f"unknown topology {name!r}: nearest slices of {chip_name}: {close}")
    return Topology(chip, tuple(int(n) for n in shape.split("x")))
