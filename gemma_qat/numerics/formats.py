"""What values a low-bit number may take: the table of formats.

A format maps a real number x, given a scale s, to an integer code c and back:

    c = clip(round(x / s + zero), code_min, code_max)          value = (c - zero) * s

| name        | codes     | zero | values / s           | scale from a tile's weights      | ties        |
|-------------|-----------|------|----------------------|----------------------------------|-------------|
| int2        | -2 .. 1   | 0    | -2 -1 0 1            | absmax / 2                       | to even     |
| int2_no_zero| -2 .. 1   | -0.5 | -1.5 -0.5 0.5 1.5    | absmax / 2                       | to even     |
| ternary     | -1 .. 1   | 0    | -1 0 1               | mean of the magnitudes           | to even     |
| int4        | -8 .. 7   | 0    | -8 .. 7              | absmax / 8                       | to even     |
| int8        | -128..127 | 0    | -128 .. 127          | absmax / 127                     | to even     |
| q4_0        | 0 .. 15   | 8    | -8 .. 7              | signed extremum / -8, float16    | up (ggml)   |
| q6_k        | -32 .. 31 | 0    | -32 .. 31            | signed extremum / -32, two-level | to even     |
| q8_0        | -128..127 | 0    | -128 .. 127          | absmax / 127, float16            | away (ggml) |

The integer grids are symmetric in the sense of "no zero point": the negative side reaches one code further. An
absmax divisor of 2^(bits-1) makes -absmax representable and lets +absmax saturate by one step; libraries disagree
(7, 7.5 and 8 are all in use at 4 bit), so a `Grid` may name its own.

`q4_0` and `q8_0` are ggml's blocks of 32. The scale d of q4_0 has a sign: d = m / -8 with m the element of largest
magnitude (the first one on ties), so m itself always lands on code 0 and is exact. Codes are trunc(x * (1 / d) + 8.5).
Codes of q8_0 are round(x * (1 / d)), halves away from zero; scales from weights reach -127 .. 127 of them. Both take
codes against the float32 d, and values against d rounded to float16. How products, sums and quotients are rounded is
part of the definition, see `rounding.py` and `scales.py`.

`q6_k` is ggml's super-block of 256: 16 tiles of 16, value = d * sc * q with one float16 d for all of them and an int8
sc for each tile. A tile's scale is the float32 d * sc (exact: 11 and 8 bits), and any scale that is given to the grid
is moved to such a product, see `scales.stored`. The grid is ggml's, and its reader gives the same values; ggml's own
quantizer searches for the scales of tiles and so may pick other points of the same grid. A tile whose scale is less
than 1/256 of its super-block's largest gets sc = 0 and stands for zeros.

A tile of zeros is valid: the formats of ggml store d = 0 and the code whose value is 0; the others store scale 1 and
that code (for int2_no_zero, which has no zero, scale 0).

Sources: ggml-common.h / ggml-quants.c (block_q4_0, block_q8_0, block_q6_K, quantize_row_q6_K_ref) in
ggml-org/llama.cpp; the Gemma integration in huggingface/transformers (`integrations/gemma_quant.py`) for the 2/4/8-bit
grids; ParetoQ (arXiv 2502.02631) for the 2-bit grid without zero; BitNet b1.58 (arXiv 2402.17764) for ternary.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from gemma_qat.errors import unknown


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """The values a code may stand for, and how a real number is rounded to one."""

    name: str
    bits: int
    code_min: int
    code_max: int
    zero: float
    scale_rule: Literal["absmax", "signed_extremum", "absmean"]
    divisor: float
    """Scale of a tile = its absmax (or signed extremum, or absmean) / divisor, unless the grid names its own."""
    ties: Literal["even", "up", "away"]
    layout: str
    """Name of the bit layout its codes are packed in (see `layouts.py`)."""
    scale_dtype: str = "float32"
    tile: int | None = None
    """The tile the format itself demands; None leaves the choice to the grid."""
    codes_against: Literal["stored", "unrounded"] = "stored"
    """Which scale codes are taken against when scales come from the weights; values always use the stored one."""
    empty_scale: float = 1.0
    """The scale written for a tile of zeros."""
    super_tiles: int = 1
    """Tiles of a super-block: above 1, a scale is the super-block's float16 times the tile's int8."""

    @property
    def lowest(self) -> float:
        """Smallest value in units of the scale."""
        return self.code_min - self.zero

    @property
    def highest(self) -> float:
        """Largest value in units of the scale."""
        return self.code_max - self.zero

    @property
    def zero_code(self) -> int:
        """The code written for a tile of zeros."""
        return round(self.zero)


FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Format(
            name="int2", bits=2, code_min=-2, code_max=1, zero=0.0, scale_rule="absmax",
            divisor=2.0, ties="even", layout="little",
        ),
        Format(
            name="int2_no_zero", bits=2, code_min=-2, code_max=1, zero=-0.5, scale_rule="absmax",
            divisor=2.0, ties="even", layout="little", empty_scale=0.0,
        ),
        Format(
            name="ternary", bits=2, code_min=-1, code_max=1, zero=0.0, scale_rule="absmean",
            divisor=1.0, ties="even", layout="little",
        ),
        Format(
            name="int4", bits=4, code_min=-8, code_max=7, zero=0.0, scale_rule="absmax",
            divisor=8.0, ties="even", layout="little",
        ),
        Format(
            name="int8", bits=8, code_min=-128, code_max=127, zero=0.0, scale_rule="absmax",
            divisor=127.0, ties="even", layout="little",
        ),
        Format(
            name="q4_0", bits=4, code_min=0, code_max=15, zero=8.0, scale_rule="signed_extremum",
            divisor=-8.0, ties="up", layout="ggml_nibbles", scale_dtype="float16", tile=32,
            codes_against="unrounded", empty_scale=0.0,
        ),
        Format(
            name="q6_k", bits=6, code_min=-32, code_max=31, zero=0.0, scale_rule="signed_extremum",
            divisor=-32.0, ties="even", layout="ggml_q6_k", tile=16, empty_scale=0.0, super_tiles=16,
        ),
        Format(
            name="q8_0", bits=8, code_min=-128, code_max=127, zero=0.0, scale_rule="absmax",
            divisor=127.0, ties="away", layout="little", scale_dtype="float16", tile=32,
            codes_against="unrounded", empty_scale=0.0,
        ),
    )
}  # fmt: skip


def format_named(name: str) -> Format:
    """Returns the format called `name`.

    Raises: InputError naming the nearest formats when there is none.
    """
    if name not in FORMATS:
        raise unknown("format", name, FORMATS)
    return FORMATS[name]


SCALE_DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """A format with the tile its scales cover and the type they are stored in.

    `tile` counts elements along the reduced axes; None means one scale per output channel (the whole reduced axis).
    Scales of a two-level grid are kept as their float32 products; in a file they weigh less.
    """

    format: str
    tile: int | None = None
    scale_dtype: str = ""
    """Empty means the format's own."""
    divisor: float = 0.0
    """0 means the format's own."""

    def __post_init__(self) -> None:
        own = format_named(self.format)
        if not self.scale_dtype:
            object.__setattr__(self, "scale_dtype", own.scale_dtype)
        if not self.divisor:
            object.__setattr__(self, "divisor", own.divisor)
        if not 0 < self.divisor / own.divisor < math.inf:
            sign = "negative" if own.divisor < 0 else "positive"
            raise ValueError(
                f"format {own.name}: divisor {self.divisor} given, a finite {sign} number expected"
            )
        if own.tile is not None:
            if self.tile not in (None, own.tile):
                raise ValueError(f"format {own.name}: tile {self.tile} given, {own.tile} expected")
            object.__setattr__(self, "tile", own.tile)
        if self.scale_dtype not in SCALE_DTYPES:
            raise unknown("scale dtype", str(self.scale_dtype), SCALE_DTYPES)
        if self.two_level and self.scale_dtype != "float32":
            raise ValueError(
                f"format {own.name}: {self.scale_dtype} scales given, float32 expected"
            )
        if self.tile is not None and self.tile < 1:
            raise ValueError(f"format {own.name}: tile {self.tile} given, at least 1 expected")

    @property
    def number(self) -> Format:
        """The format behind the name."""
        return FORMATS[self.format]

    @property
    def two_level(self) -> bool:
        """Whether scales are themselves codes on a coarser grid (a super-block's scale times a small integer)."""
        return self.number.super_tiles > 1

    def tiles(self, reduced: int, where: str = "array") -> int:
        """Returns how many tiles cover a reduced axis of `reduced` elements.

        Raises: ValueError when the tile, or the super-block of a two-level grid, does not divide it, naming both
            numbers and `where`.
        """
        tile = reduced if self.tile is None else self.tile
        block = tile * self.number.super_tiles
        if reduced < 1 or reduced % block:
            name = "super-block" if self.two_level else "tile"
            raise ValueError(
                f"{where}: {name} {block} does not divide the reduced axis of {reduced}"
            )
        return reduced // tile

    def bits_per_weight(self, reduced: int) -> float:
        """Returns stored bits per weight, scales included, for a reduced axis of `reduced`."""
        scale_bits = 32.0 if self.scale_dtype == "float32" else 16.0
        if self.two_level:
            scale_bits = 8 + 16 / self.number.super_tiles
        return self.number.bits + scale_bits * self.tiles(reduced) / reduced
