"""What was published about the memory of the quantized checkpoints, next to what our shapes give.

Google's documentation lists memory in GiB. Its mobile text-only column counts the packed text decoder without the
per-layer table, and is exact. Its bfloat16 and Q4_0 columns are no bytes: they are 2 and 0.5 bytes times all
parameters, vision and audio encoders included, times 1.2. The released GGUF files (Google's, and community files with
every matrix in Q4_0) carry the vocabulary and metadata beside the weights, some 15 MB.

Sources: ai.google.dev/gemma/docs/core (memory table, 2026); file sizes of google/gemma-4-*-it-qat-q4_0-gguf and of
unsloth's UD-Q4_K_XL files of them on Hugging Face.
"""

from __future__ import annotations

import dataclasses

GB, GIB = 1e9, 2.0**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
    """One published figure and what it counts."""

    value: float
    unit: float
    what: str
    is_exact: bool = False
    without: frozenset[str] = frozenset()
    """Roles it leaves out."""

    @property
    def unit_name(self) -> str:
        """GB or GiB."""
        return "GiB" if self.unit == GIB else "GB"


def _files(what: str, **sizes: float) -> dict[str, Published]:
    return {
        size.removeprefix("_"): Published(value=value, unit=GB, what=what)
        for size, value in sizes.items()
    }


def _mobile(value: float) -> Published:
    return Published(
        value=value, unit=GIB, what="text-only memory, Google's documentation", is_exact=True,
        without=frozenset({"per_layer_embed"}),
    )  # fmt: skip


PUBLISHED: dict[str, dict[str, Published]] = {
    "q4_0": _files(
        "GGUF file with every matrix in Q4_0, vocabulary included",
        e2b=2.62, e4b=4.22, _12b=6.72, _26b_a4b=14.2, _31b=17.3,
    ),
    "q4_0_google": _files(
        "Google's GGUF file, vocabulary included",
        e2b=3.35, e4b=5.15, _12b=6.98, _26b_a4b=14.4, _31b=17.7,
    ),
    "mobile": {"e2b": _mobile(0.84), "e4b": _mobile(2.2)},
}  # fmt: skip
"""By recipe and size."""
