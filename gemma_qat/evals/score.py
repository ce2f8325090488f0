"""Running models over held-out rows: per-token records of every model beside one reference.

The reference runs once per batch and every student is scored against its hidden states, so that nothing of
size [B, T, V] is kept. Students may be float, fake-quantized or packed; only their leaves differ.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_qat.data.packing import Rows, targets
from gemma_qat.errors import InputError
from gemma_qat.evals.records import TokenRecords
from gemma_qat.models import Gemma4
from gemma_qat.nn.module import merge, split
from gemma_qat.train.losses import chunked, token_scores

Progress = Callable[[str, int, int], None]


def score(
    students: Mapping[str, Gemma4],
    reference: Gemma4,
    rows: Rows,
    token_bytes: np.ndarray,
    *,
    batch_size: int = 16,
    chunk: int = 0,
    progress: Progress | None = None,
) -> tuple[TokenRecords, dict[str, TokenRecords]]:
    """Returns (records of the reference, records of each student), one record per target token.

    Shapes: token_bytes int64 [V], UTF-8 bytes each token stands for; bytes are counted over the targets that
    are scored.
    Raises: InputError when a model's vocabulary is smaller than the rows'.
    """
    for name, model in {"reference": reference, **students}.items():
        if rows.tokens.max() >= model.config.vocab_size:
            raise InputError(
                f"{name}: vocabulary of {model.config.vocab_size}, but the text has token {rows.tokens.max()}"
            )
    wanted, weights = targets(rows)
    kept: dict[str, list[dict[str, np.ndarray]]] = {name: [] for name in students}
    total = -(-len(rows) // batch_size)
    graph, state = split(reference)
    parts = {name: split(model) for name, model in students.items()}
    for index in range(total):
        batch = _batch(rows, wanted, index * batch_size, batch_size)
        hidden = _hidden(graph, state, batch)
        for name, (own_graph, own_state) in parts.items():
            scores = _scores(own_graph, own_state, graph, state, hidden, batch, chunk)
            kept[name].append(jax.tree.map(np.asarray, scores))
        if progress:
            progress("evaluate", index + 1, total)
    scored = weights > 0
    document, sizes = _documents(rows, wanted, scored, token_bytes)
    records = {name: _records(parts_of, scored, document, sizes) for name, parts_of in kept.items()}
    first = next(iter(records.values()))
    own = TokenRecords.of_reference(
        document=document, nll=first.reference_nll, document_bytes=sizes
    )
    return own, records


def _batch(rows: Rows, wanted: np.ndarray, start: int, size: int) -> dict[str, jax.Array]:
    """Returns rows start .. start + size, the last batch filled up with padding rows so that shapes repeat."""
    arrays = {
        "tokens": rows.tokens, "positions": rows.positions, "segments": rows.segments, "targets": wanted
    }  # fmt: skip
    cut = {name: array[start : start + size] for name, array in arrays.items()}
    short = size - len(cut["tokens"])
    return {name: jnp.asarray(np.pad(array, ((0, short), (0, 0)))) for name, array in cut.items()}


@functools.partial(jax.jit, static_argnums=0)
def _hidden(graph: Any, state: Any, batch: dict[str, jax.Array]) -> jax.Array:
    model = merge(graph, state)
    return model.hidden(batch["tokens"], batch["positions"], batch["segments"])[0]


@functools.partial(jax.jit, static_argnums=(0, 2, 6))
def _scores(
    graph: Any, state: Any, reference_graph: Any, reference_state: Any,
    reference_hidden: jax.Array, batch: dict[str, jax.Array], chunk: int,
) -> dict[str, jax.Array]:  # fmt: skip
    model, reference = merge(graph, state), merge(reference_graph, reference_state)
    hidden, _ = model.hidden(batch["tokens"], batch["positions"], batch["segments"])
    arrays = [hidden, batch["targets"], reference_hidden]
    return chunked(lambda h, t, r: token_scores(model, h, t, reference, r), arrays, chunk)


def _documents(
    rows: Rows, wanted: np.ndarray, scored: np.ndarray, token_bytes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (document of each scored token, renumbered without gaps; bytes of each document's scored tokens)."""
    present, document = np.unique(rows.documents[scored], return_inverse=True)
    sizes = np.bincount(document, weights=token_bytes[wanted[scored]], minlength=len(present))
    return document.astype(np.int32), sizes.astype(np.int64)


def _records(
    batches: list[dict[str, np.ndarray]],
    scored: np.ndarray,
    document: np.ndarray,
    sizes: np.ndarray,
) -> TokenRecords:
    def joined(name: str) -> np.ndarray:
        return np.concatenate([batch[name] for batch in batches])[: len(scored)][scored]

    return TokenRecords(
        document=document,
        nll=joined("nll").astype(np.float64),
        reference_nll=joined("teacher_nll").astype(np.float64),
        # Rounding can leave a divergence of equal distributions a hair below zero.
        kl=np.maximum(joined("kl").astype(np.float64), 0.0),
        agree=joined("agree") > 0.5,
        document_bytes=sizes,
    )
