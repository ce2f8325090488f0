"""Prompts of different lengths as one batch, padded on the left and checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from gemma_qat.errors import InputError
from gemma_qat.models.config import ModelConfig

Prompts = Sequence[Any] | np.ndarray | jax.Array
"""One list (or array) of token ids per row, of any integer type."""


def left_padded(
    config: ModelConfig, prompts: Prompts, new: int, multiple: int = 1, least: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (tokens, segments) int32 [B, T], padding first with segment 0.

    T is at least `least`, and a multiple of `multiple`, or the length of the longest prompt where that is shorter.

    Raises: InputError for an empty prompt, a token outside the vocabulary, or a length beyond the model's positions.
    """
    rows = [np.asarray(row) for row in prompts]
    vocab = config.vocab_size
    for number, row in enumerate(rows):
        if row.ndim != 1 or not row.size or row.dtype.kind not in "iu":
            raise InputError(f"prompt {number}: a non-empty list of integer tokens expected")
        outside = row[(row < 0) | (row >= vocab)]
        if outside.size:
            raise InputError(
                f"prompt {number}: token {outside[0]} is outside the vocabulary of {vocab}"
            )
    if not rows:
        raise InputError("at least one prompt expected, none given")
    length = max(row.size for row in rows)
    if length + new > config.max_positions:
        raise InputError(
            f"{length} prompt tokens and {new} new ones exceed the model's {config.max_positions} positions"
        )
    length = max(length, least)
    length += -length % min(multiple, length)
    tokens = np.zeros((len(rows), length), np.int32)
    segments = np.zeros_like(tokens)
    for number, row in enumerate(rows):
        tokens[number, length - row.size :] = row
        segments[number, length - row.size :] = 1
    return tokens, segments
