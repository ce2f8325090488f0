"""Running models over held-out rows: per-token records of every model beside one reference.

The reference's hidden states are there already (`reference.py`). Logits of student and reference are made of a few
positions at a time, so nothing of size [B, T, V] is ever there. Students may be float, fake-quantized or packed; only
their leaves differ.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from gemma_qat.data.packing import Rows, targets
from gemma_qat.errors import InputError
from gemma_qat.evals.records import TokenRecords
from gemma_qat.evals.reference import (
    Head,
    Reference,
    batch_of,
    check_vocabulary,
    reference_of,
    rows_at_once,
)
from gemma_qat.models import Gemma4
from gemma_qat.nn.module import merge, split
from gemma_qat.sharding import constrain
from gemma_qat.train.losses import Scores, chunked, logit_scores

Progress = Callable[[str, int, int], None]

LOGITS_AT_ONCE = 2**24
"""Elements of the logits of a step: 64 MB in float32, of which a few copies are there at a time."""


def score(
    students: Mapping[str, Gemma4],
    reference: Gemma4 | Reference,
    rows: Rows,
    token_bytes: np.ndarray,
    *,
    batch_size: int = 16,
    chunk: int = 0,
    progress: Progress | None = None,
    label: str = "evaluate",
) -> tuple[TokenRecords, dict[str, TokenRecords]]:
    """Returns (records of the reference, records of each student), one record per target token.

    Shapes: token_bytes int64 [V], UTF-8 bytes each token stands for; bytes are counted over the targets that are
    scored.
    `chunk` is how many positions logits are made of at a time; 0 is as many as `LOGITS_AT_ONCE` leaves room for.
    Raises: InputError when a model's vocabulary is smaller than the rows', or what it says is not finite; ValueError
        when there is no student, or the reference is of other rows.
    """
    if not students:
        raise ValueError("score: no model to measure")
    for name, model in students.items():
        check_vocabulary(name, model, rows)
    if isinstance(reference, Gemma4):
        reference = reference_of(reference, rows, batch_size=batch_size, progress=progress)
    elif reference.rows.digest != rows.digest:
        raise ValueError("score: the reference's hidden states are of other rows")
    wanted, weights = targets(rows)
    scored = weights > 0
    document, sizes = _documents(rows, wanted, scored, token_bytes)
    position = (rows.positions + 1)[scored]
    records = {}
    for name, model in students.items():
        found = _scored(
            model, reference, rows, wanted, batch_size, chunk, progress, f"{label} {name}"
        )
        _refuse_nonfinite("the reference", found["teacher_nll"][scored])
        _refuse_nonfinite(name, found["kl"][scored])
        records[name] = _records(found, scored, document, position, sizes)
    first = next(iter(records.values()))
    own = TokenRecords.of_reference(
        document=document, position=position, nll=first.reference_nll, document_bytes=sizes
    )
    return own, records


def _refuse_nonfinite(name: str, values: np.ndarray) -> None:
    bad = int((~np.isfinite(values)).sum())
    if bad:
        raise InputError(
            f"{name}: what it says of {bad} of {values.size} tokens is not finite; are its parameters?"
        )


def _scored(
    model: Gemma4, reference: Reference, rows: Rows, wanted: np.ndarray, batch_size: int, chunk: int,
    progress: Progress | None, label: str,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Returns every score of one student, [rows, T]."""
    size = rows_at_once(batch_size, model.placement)
    length = rows.tokens.shape[1]
    chunk = chunk or positions_at_once(size, length, model.config.vocab_size)
    arrays = {
        "tokens": rows.tokens, "positions": rows.positions, "segments": rows.segments,
        "targets": wanted, "reference": reference.hidden,
    }  # fmt: skip
    graph, state = split(model)
    kept: list[dict[str, np.ndarray]] = []
    for start in range(0, len(rows), size):
        batch = batch_of(arrays, start, size, model.placement)
        found = _scores(graph, state, reference.head, reference.leaves, batch, chunk)
        kept.append({name: np.asarray(part) for name, part in found.items()})
        if progress:
            progress(label, min(start + size, len(rows)), len(rows))
    return {n: np.concatenate([part[n] for part in kept])[: len(rows)] for n in kept[0]}


def positions_at_once(rows: int, length: int, vocab_size: int) -> int:
    """Returns the most positions of each row that divide its length and whose logits are within `LOGITS_AT_ONCE`."""
    most = max(1, LOGITS_AT_ONCE // (rows * vocab_size))
    return next(n for n in range(min(most, length), 0, -1) if length % n == 0)


@functools.partial(jax.jit, static_argnums=(0, 2, 5))
def _scores(
    graph: Any, state: Any, head: Head, leaves: Mapping[str, Any], batch: dict[str, jax.Array], chunk: int
) -> Scores:  # fmt: skip
    model: Gemma4 = merge(graph, state)
    hidden, _ = model.hidden(batch["tokens"], batch["positions"], batch["segments"])

    def score(own: jax.Array, wanted: jax.Array, guide: jax.Array) -> Scores:
        return logit_scores(model.logits(own), wanted, head.logits(leaves, guide))

    found = chunked(score, [hidden, batch["targets"], batch["reference"]], chunk)
    return {n: constrain(part, (None, None), model.placement) for n, part in found.items()}


def _documents(
    rows: Rows, wanted: np.ndarray, scored: np.ndarray, token_bytes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (document of each scored token, renumbered without gaps; bytes of each document's scored tokens)."""
    present, document = np.unique(rows.documents[scored], return_inverse=True)
    sizes = np.bincount(document, weights=token_bytes[wanted[scored]], minlength=len(present))
    return document.astype(np.int32), sizes.astype(np.int64)


def _records(
    found: Mapping[str, np.ndarray],
    scored: np.ndarray,
    document: np.ndarray,
    position: np.ndarray,
    sizes: np.ndarray,
) -> TokenRecords:
    return TokenRecords(
        document=document,
        position=position,
        nll=found["nll"][scored].astype(np.float64),
        reference_nll=found["teacher_nll"][scored].astype(np.float64),
        # Rounding can leave a divergence of equal distributions a hair below zero.
        kl=np.maximum(found["kl"][scored].astype(np.float64), 0.0),
        agree=found["agree"][scored] > 0.5,
        document_bytes=sizes,
    )
