"""The mix of formats that keeps most under a number of bytes: a knapsack with one choice per class.

    minimize    sum of kl[c][choice of c]
    so that     sum of bytes[c][choice of c] <= capacity

Sums of bytes and divergence are built class by class. Of all sums so far only those are kept that no other beats in
both (the Pareto front): what is left at the end holds the least divergence for every number of bytes, exactly. Only if
the front outgrows `MOST` is it thinned, to the best sum of each of `MOST` equal ranges of bytes; then the answer is at
least as good as every mix that stays below the capacity by classes x capacity / MOST.

That divergences add up is an assumption; the mix has to be measured (`mixing.py`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float64

from gemma_qat.errors import InputError

MOST = 2**15
_UNITS = {"": 1.0, "b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12}


def bytes_of(text: str, float_bytes: float) -> float:
    """Returns the bytes of `2.5GB`, `700 MB` or `123456`, or of `0.6x`: that share of the float model's.

    Units: GB is 1e9 bytes.
    Raises: InputError for anything else, or nothing.
    """
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*([a-z]*)\s*", text.lower())
    number, unit = found.groups() if found else ("0", "")
    size = float(number) * (float_bytes if unit == "x" else _UNITS.get(unit, 0.0))
    if not 0 < size < float("inf"):
        raise InputError(
            f"budget {text!r}: bytes such as 2.5GB or 700MB expected, or a share of the float model's such as 0.3x"
        )
    return size


def best_mix(
    sizes: Sequence[Sequence[float]], losses: Sequence[Sequence[float]], capacity: float
) -> list[int]:
    """Returns the choice of each class with the least sum of losses whose sum of sizes is within `capacity`.

    Raises: InputError when even the smallest choices are larger, saying how large.
    """
    least = np.asarray([min(of_class) for of_class in sizes])
    if least.sum() > capacity:
        raise InputError(
            f"budget of {capacity:,.0f} bytes: the smallest candidates of all classes are {least.sum():,.0f}; give "
            "more, or candidates of fewer bits"
        )
    size, loss = np.zeros(1), np.zeros(1)
    steps = []
    for index, (own_sizes, own_losses) in enumerate(zip(sizes, losses, strict=True)):
        room = capacity - least[index + 1 :].sum()
        sums = (size[:, None] + np.asarray(own_sizes)[None]).ravel()
        lost = (loss[:, None] + np.asarray(own_losses)[None]).ravel()
        kept = np.flatnonzero(sums <= room)
        kept = kept[np.lexsort((lost[kept], sums[kept]))]
        kept = kept[_unbeaten(lost[kept])]
        kept = kept[_thin(sums[kept], room)] if len(kept) > MOST else kept
        steps.append(np.divmod(kept, len(own_sizes)))
        size, loss = sums[kept], lost[kept]
    state, choices = len(size) - 1, []  # The last of a front has the most bytes and the least loss.
    for parents, chosen in reversed(steps):
        choices.append(int(chosen[state]))
        state = int(parents[state])
    return choices[::-1]


def _unbeaten(lost: Float64[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
    """Returns which of sums in order of bytes lose less than all before them."""
    before = np.minimum.accumulate(np.concatenate([[np.inf], lost[:-1]]))
    return lost < before


def _thin(sums: Float64[np.ndarray, " n"], room: float) -> Bool[np.ndarray, " n"]:
    """Returns the last, so the best, of each of `MOST` equal ranges of bytes."""
    width = (room - sums[0]) / MOST
    cell = np.floor((sums - sums[0]) / width)
    return np.append(cell[1:] != cell[:-1], True)
