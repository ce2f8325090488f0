"""Intervals by resampling whole documents: the cluster bootstrap.

Tokens of one file are far from independent: a file that is hard to predict is hard throughout.
Resampling tokens would treat n tokens as n facts and give intervals several times too narrow. Here
a draw takes as many documents as there are, with replacement, and keeps each document whole:

    counts [draws, documents]   how often each document appears in each draw; every row sums to
    `documents` mean of x in draw i         (counts[i] @ sum of x per document) / (counts[i] @
    tokens per document)

The same counts serve every model, so the difference of two models is resampled pair by pair: what
makes a document hard for both cancels, and the interval of a difference is far narrower than the
two intervals suggest.

Quantiles are not ratios of sums. They are still exact for all draws: the values are sorted once and
cut into about sqrt(n) blocks of sqrt(n); one matrix product says how much of every draw lies in
each block, and only the one block that holds the wanted rank is looked at element by element. The
cost is draws x sqrt(n), not draws x n.

Source: Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), chapters 8 and 13
(percentile interval); Koehn, "Statistical significance tests for machine translation evaluation"
(2004) for the paired form.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from fractions import Fraction

import numpy as np
from jaxtyping import Float64, Int32, Integer

AT_ONCE = 2**22
"""Elements of the counts that are worked on at a time: 32 MB in float64."""


@dataclasses.dataclass(frozen=True)
class Resamples:
    """Seeded draws of documents with replacement, shared by every model that is compared.

    Raises: ValueError for fewer than two documents (there is no spread to resample) or for no
    draws.
    """

    document_count: int
    _: dataclasses.KW_ONLY
    seed: int
    draws: int = 2000

    def __post_init__(self) -> None:
        if self.document_count < 2:
            raise ValueError(
                f"Resamples: {self.document_count} document(s) given, expected at least 2"
            )
        if self.draws < 1:
            raise ValueError(f"Resamples: draws = {self.draws}, expected at least 1")

    @functools.cached_property
    def counts(self) -> Int32[np.ndarray, "draws documents"]:
        """How often each document appears in each draw; every row sums to the number of
        documents."""
        generator = np.random.default_rng(self.seed)
        found = np.empty((self.draws, self.document_count), np.int32)
        for part in self.blocks:
            shape = found[part].shape
            cell = (
                generator.integers(shape[1], size=shape) + shape[1] * np.arange(shape[0])[:, None]
            )
            found[part] = np.bincount(cell.ravel(), minlength=found[part].size).reshape(shape)
        return found

    @property
    def blocks(self) -> list[slice]:
        """Draws some at a time, so that what is made of `counts` stays small beside them."""
        size = max(1, AT_ONCE // self.document_count)
        return [slice(start, start + size) for start in range(0, self.draws, size)]

    def ratio(
        self,
        numerator: Float64[np.ndarray, " documents"],
        denominator: Float64[np.ndarray, " documents"],
    ) -> Float64[np.ndarray, " draws"]:
        """Returns the ratio of two sums in every draw, from their sums per document."""
        sums = [self.counts[part] @ np.stack([numerator, denominator], 1) for part in self.blocks]
        above, below = np.concatenate(sums).T
        return above / below


def interval(values: Float64[np.ndarray, " draws"], level: float = 0.95) -> tuple[float, float]:
    """Returns the percentile interval that holds `level` of the draws.

    Raises: ValueError when `level` is not between 0 and 1.
    """
    if not 0 < level < 1:
        raise ValueError(f"interval: level = {level}, expected a number between 0 and 1")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def quantile(values: Float64[np.ndarray, " n"], level: float) -> float:
    """Returns the smallest value that at least `level` of the values do not exceed.

    Exactness: numpy's method 'inverted_cdf'; always one of the values, never a mean of two.
    """
    rank = int(_rank(level, np.array([len(values)], dtype=np.int64))[0])
    return float(np.partition(values, rank - 1)[rank - 1])


def resampled_quantile(
    values: Float64[np.ndarray, " n"],
    document: Integer[np.ndarray, " n"],
    level: float,
    resamples: Resamples,
) -> Float64[np.ndarray, " draws"]:
    """Returns the quantile of every draw, each token counted as often as its document was drawn.

    Exactness: equal to `quantile` of the values repeated draw by draw; all arithmetic on ranks is
    in integers.
    """
    order = np.argsort(values, kind="stable")
    width = math.isqrt(len(values) - 1) + 1
    filled = _filled(document[order], width, resamples)
    rank = _rank(level, filled[:, -1])
    block = (filled < rank[:, None]).sum(axis=1)
    draw = np.arange(resamples.draws)
    before = np.where(block > 0, filled[draw, block - 1], 0)
    # One block's tokens per draw; positions past the end belong to a document that is never drawn.
    position = block[:, None] * width + np.arange(width)
    owner = np.append(document[order], np.full(width, resamples.document_count))
    counts = np.pad(resamples.counts, ((0, 0), (0, 1)))
    reached = before[:, None] + counts[draw[:, None], owner[position]].cumsum(axis=1)
    return values[order][position[draw, (reached >= rank[:, None]).argmax(axis=1)]]


def _filled(owner: np.ndarray, width: int, resamples: Resamples) -> np.ndarray:
    """Returns how many tokens of each draw lie in each block or before it, [draws, blocks]."""
    documents, blocks = resamples.document_count, -(-len(owner) // width)
    cell = np.arange(len(owner)) // width * documents + owner
    table = np.bincount(cell, minlength=blocks * documents).reshape(blocks, documents)
    # In float64 for the fast product: sums are whole numbers far below 2**53, nothing is lost.
    tokens = table.T.astype(np.float64)
    inside = [resamples.counts[part].astype(np.float64) @ tokens for part in resamples.blocks]
    return np.concatenate(inside).astype(np.int64).cumsum(axis=1)


def _rank(level: float, total: np.ndarray) -> np.ndarray:
    """Returns the rank, counted from 1, of the quantile among `total` values."""
    if not 0 < level < 1:
        raise ValueError(f"quantile: level = {level}, expected a number between 0 and 1")
    # As a fraction: in floats 0.07 * 100 is 7.000000000000001, which rounds up to rank 8.
    share = Fraction(level).limit_denominator(10_000)
    return np.maximum(1, -(-total * share.numerator // share.denominator))
