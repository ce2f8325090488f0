"""What was published about the memory of the quantized checkpoints, next to what our shapes give.

Google's documentation lists memory in GiB, in columns that count different things:

| column | what it is |
|---|---|
| mobile, text only | bytes of the packed text decoder without the per-layer table |
| BF16, Q4_0 | all parameters, vision and audio encoders included, times 2 or 0.5 bytes, times 1.2 |

So its Q4_0 column has 4 bits a weight where the format has 4.5, and a fifth on top. `Estimate` is such a figure, taken
apart. The released GGUF files (Google's, and community files with every matrix in Q4_0) carry the vocabulary and
metadata beside the weights, some 15 MB; what vLLM loads of w4a16 includes the encoders.

Sources: ai.google.dev/gemma/docs/core (memory table, 2026); file sizes of google/gemma-4-*-it-qat-q4_0-gguf and of
unsloth's UD-Q4_K_XL files of them on Hugging Face; the Gemma 4 recipe of vLLM. The numbers of parameters with encoders
are derived: with them both columns of Google's table come out to its digits.
"""

from __future__ import annotations

import dataclasses

GB, GIB = 1e9, 2.0**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
    """One published figure in bytes and what it counts."""

    value: float
    unit: float
    what: str
    without: frozenset[str] = frozenset()
    """Roles it leaves out."""

    @property
    def unit_name(self) -> str:
        """GB or GiB."""
        return "GiB" if self.unit == GIB else "GB"

    def line(self, sizes: dict[str, float], parameters: int) -> str:
        """Returns the comparison with our bytes by role, in words; the number of `parameters` does not matter."""
        del parameters
        ours = sum(size for role, size in sizes.items() if role not in self.without) / self.unit
        return (
            f"published {self.value} {self.unit_name} ({self.what}): ours {ours:.3f}, "
            f"{ours / self.value - 1:+.1%}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """A published figure that is no bytes: parameters times bytes each times 1.2, in GiB.

    Units: `billions` of parameters, encoders included; `each` in bytes.
    """

    value: float
    column: str
    billions: float
    each: float

    OVERHEAD = 1.2

    @property
    def decoded(self) -> float:
        """What it is made of, multiplied out; GiB."""
        return self.billions * 1e9 * self.each * self.OVERHEAD / GIB

    def line(self, sizes: dict[str, float], parameters: int) -> str:
        """Returns how the figure comes about, and what our bytes and `parameters` are beside it."""
        ours = sum(sizes.values()) / GIB
        return (
            f"published {self.value} GiB (Google's documentation, {self.column}) is no bytes: {self.billions} B "
            f"parameters with encoders x {self.each:g} bytes x {self.OVERHEAD} = {self.decoded:.2f}; the decoder has "
            f"{parameters / 1e9:.2f} B, {ours:.3f} GiB stored, {ours / self.value - 1:+.1%}"
        )


def _files(what: str, **sizes: float) -> dict[str, Published]:
    return {
        size.removeprefix("_"): Published(value=value, unit=GB, what=what)
        for size, value in sizes.items()
    }


_BILLIONS = {"e2b": 5.12, "e4b": 8.00, "12b": 11.95, "26b_a4b": 25.8, "31b": 31.27}


def _column(column: str, each: float, **sizes: float) -> dict[str, Estimate]:
    named = {size.removeprefix("_"): value for size, value in sizes.items()}
    return {
        size: Estimate(value=value, column=column, billions=_BILLIONS[size], each=each)
        for size, value in named.items()
    }


def _mobile(value: float) -> Published:
    return Published(
        value=value, unit=GIB, what="text-only memory, Google's documentation",
        without=frozenset({"per_layer_embed"}),
    )  # fmt: skip


_Q4_0 = _column("Q4_0", 0.5, e2b=2.9, e4b=4.5, _12b=6.7, _26b_a4b=14.4, _31b=17.5)

PUBLISHED: dict[str, tuple[dict[str, Published] | dict[str, Estimate], ...]] = {
    "float": (_column("BF16", 2.0, e2b=11.4, e4b=17.9, _12b=26.7, _26b_a4b=57.7, _31b=69.9),),
    "q4_0": (
        _files(
            "GGUF file with every matrix in Q4_0, vocabulary included",
            e2b=2.62, e4b=4.22, _12b=6.72, _26b_a4b=14.2, _31b=17.3,
        ),
        _Q4_0,
    ),
    "q4_0_google": (
        _files(
            "Google's GGUF file, vocabulary included",
            e2b=3.35, e4b=5.15, _12b=6.98, _26b_a4b=14.4, _31b=17.7,
        ),
        _Q4_0,
    ),
    "w4a16": (
        _files("what vLLM loads, encoders included", e2b=7.3, e4b=9.8, _12b=8.3, _31b=19.8),
    ),
    "mobile": ({"e2b": _mobile(0.84), "e4b": _mobile(2.2)},),
}  # fmt: skip
"""By recipe, a table for each source, by size."""


def published(recipe: str, size: str) -> list[Published | Estimate]:
    """Returns the figures that were published of a size under a recipe."""
    return [table[size] for table in PUBLISHED.get(recipe, ()) if size in table]
