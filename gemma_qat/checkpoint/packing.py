"""Codes of any size as they are stored: words and scales on the host."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from gemma_qat.numerics import QArray, pack

_ROWS = 64 * 2**20
"""Codes of a table that are packed at a time."""


def packed_by_rows(q: QArray) -> dict[str, np.ndarray]:
    """Returns words and scale; tables by rows, for packing works in wider integers than it stores."""
    rows = q.shape[0]
    if 0 not in q.reduced:
        rows = max(1, _ROWS // max(1, int(np.prod(q.shape[1:]))))
    packing = jax.jit(pack)
    words, scales = [], []
    for start in range(0, q.shape[0], rows):
        cut = slice(start, start + rows) if rows < q.shape[0] else slice(None)
        packed = packing(dataclasses.replace(q, codes=q.codes[cut], scale=q.scale[cut]))
        words.append(np.asarray(packed.words))
        scales.append(np.asarray(packed.scale))
    return {"words": _joined(words), "scale": _joined(scales)}


def _joined(pieces: list[np.ndarray]) -> np.ndarray:
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
