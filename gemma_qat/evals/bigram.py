"""A bigram model of the training tokens: what counting pairs alone can predict.

A language model that does not beat it has learned nothing about context, and differences between
two quantized copies of such a model mean little. It is the report's floor, as the float model is
its ceiling.

    P(w)     = (n(w) + T / V) / (N + T)                 N pairs, T kinds of follower, V tokens
    P(w | c) = (n(c, w) + T(c) P(w)) / (n(c) + T(c))    the same of the pairs that start with c

Each level gives the next one the weight T / (N + T): the more different followers a context has
shown, the likelier the next one is new. An unseen context falls back to P(w) and an empty count to
1 / V, so every row sums to one. There is no parameter to tune on held-out text. Pairs are kept as
sorted keys c * V + w, so memory follows the text, not V * V.

Source: Witten and Bell, "The zero-frequency problem" (1991), method C, in the interpolated form of
Chen and Goodman, "An empirical study of smoothing techniques for language modeling" (1998), section
2.5.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float64, Int64, Integer


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class BigramModel:
    """Counts of adjacent pairs, smoothed by Witten-Bell interpolation when asked for probabilities.

    Shapes: `keys` and `pair_counts` [distinct pairs]; `follower_counts`, `context_counts`,
    `context_kinds` [V].
    Units: `keys` are first * V + second, ascending; `context_kinds` is the number of distinct
    followers.
    """

    vocab_size: int
    keys: np.ndarray
    pair_counts: np.ndarray
    follower_counts: np.ndarray
    context_counts: np.ndarray
    context_kinds: np.ndarray

    @classmethod
    def count(
        cls,
        tokens: Integer[np.ndarray, "M T"],
        segments: Integer[np.ndarray, "M T"],
        vocab_size: int,
    ) -> BigramModel:
        """Returns the model of all adjacent pairs that lie in one segment; segment 0 is padding.

        Raises: ValueError for a paired token outside the vocabulary.
        """
        first, second = _pairs(tokens, segments, vocab_size)
        keys, pair_counts = np.unique(first * vocab_size + second, return_counts=True)
        return cls(
            vocab_size=vocab_size,
            keys=keys,
            pair_counts=pair_counts,
            follower_counts=np.bincount(second, minlength=vocab_size),
            context_counts=np.bincount(first, minlength=vocab_size),
            context_kinds=np.bincount(keys // vocab_size, minlength=vocab_size),
        )

    def nll(
        self, tokens: Integer[np.ndarray, "M T"], segments: Integer[np.ndarray, "M T"]
    ) -> Float64[np.ndarray, " pairs"]:
        """Returns the negative log-likelihood of every pair's second token, row by row.

        Units: nats. The first token of a segment has no pair and no entry.
        Raises: ValueError for a paired token outside the vocabulary.
        """
        first, second = _pairs(tokens, segments, self.vocab_size)
        return -np.log(self._probability(first, second))

    def probabilities(self, context: int) -> Float64[np.ndarray, " V"]:
        """Returns the distribution over the token that follows `context`; sums to one."""
        second = np.arange(self.vocab_size, dtype=np.int64)
        return self._probability(np.full_like(second, context), second)

    def _probability(
        self, first: Int64[np.ndarray, " pairs"], second: Int64[np.ndarray, " pairs"]
    ) -> Float64[np.ndarray, " pairs"]:
        kinds = self.context_kinds[first]
        total = self.context_counts[first] + kinds
        seen = self._pair_count(first, second) + kinds * self._unigram()[second]
        # An unseen context has no counts of its own: total is 0 and the unigram stands alone.
        return np.where(total > 0, seen / np.maximum(total, 1), self._unigram()[second])

    def _unigram(self) -> np.ndarray:
        kinds = np.count_nonzero(self.follower_counts)
        total = self.follower_counts.sum() + kinds
        if not total:
            return np.full(self.vocab_size, 1 / self.vocab_size)
        return (self.follower_counts + kinds / self.vocab_size) / total

    def _pair_count(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        if not self.keys.size:
            return np.zeros(first.shape, dtype=np.int64)
        wanted = first * self.vocab_size + second
        place = np.minimum(np.searchsorted(self.keys, wanted), self.keys.size - 1)
        return np.where(self.keys[place] == wanted, self.pair_counts[place], 0)


def _pairs(
    tokens: np.ndarray, segments: np.ndarray, vocab_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first and second tokens of all pairs inside one segment, as int64."""
    inside = (segments[:, :-1] == segments[:, 1:]) & (segments[:, :-1] != 0)
    first = tokens[:, :-1][inside].astype(np.int64)
    second = tokens[:, 1:][inside].astype(np.int64)
    for ids in (first, second):
        if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
            raise ValueError(
                f"BigramModel: tokens range over {ids.min()}..{ids.max()}, "
                f"expected 0..{vocab_size - 1} for a vocabulary of {vocab_size}"
            )
    return first, second
