"""What scoring one model on the held-out text leaves behind: one record per scored token.

A record keeps the model's own loss, the reference's loss on the same token, the divergence between
the two distributions there, and the document (held-out file) the token came from. Every number of
the report is computed from these columns, so it can be recomputed, resampled and compared without
running a model again.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Float64, Integer, Num

# Field, accepted dtype kinds, kept dtype. `document_bytes` is per document, the rest per token.
_COLUMNS = (
    ("document", "iu", np.int32),
    ("position", "iu", np.int32),
    ("nll", "f", np.float64),
    ("reference_nll", "f", np.float64),
    ("kl", "f", np.float64),
    ("agree", "b", np.bool_),
    ("document_bytes", "iu", np.int64),
)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TokenRecords:
    """The scored tokens of one model on held-out documents, as read-only columns.

    Shapes: `document`, `position`, `nll`, `reference_nll`, `kl`, `agree` [n]; `document_bytes` [documents].
    Units: `document` indexes `document_bytes`; `position` counts the tokens that stand before it in its row; `nll` and
    `reference_nll` are nats for the true token; `kl` is KL(reference || model) in nats; `agree` says that both put the
    same token first; bytes are UTF-8 bytes of a file.
    Raises: ValueError, in one line naming the column, for a wrong dtype or shape, a value that is
    not finite, a document out of range, or a document without bytes or without tokens (its bytes
    would count in bits per byte, its loss not).
    """

    document: np.ndarray
    position: np.ndarray
    nll: np.ndarray
    reference_nll: np.ndarray
    kl: np.ndarray
    agree: np.ndarray
    document_bytes: np.ndarray

    def __post_init__(self) -> None:
        for name, kinds, dtype in _COLUMNS:
            object.__setattr__(self, name, _column(name, getattr(self, name), kinds, dtype))
        for name, _, _ in _COLUMNS[:-1]:
            length = len(getattr(self, name))
            if length != self.tokens:
                raise ValueError(
                    f"TokenRecords.{name}: has {length} tokens, document has {self.tokens}"
                )
        _check_documents(self.document, self.document_bytes)

    @classmethod
    def of_reference(
        cls,
        *,
        document: Integer[np.ndarray, " n"],
        position: Integer[np.ndarray, " n"],
        nll: Float[np.ndarray, " n"],
        document_bytes: Integer[np.ndarray, " documents"],
    ) -> TokenRecords:
        """Returns the records of the reference itself: no divergence, agreement everywhere."""
        return cls(
            document=document,
            position=position,
            nll=nll,
            reference_nll=nll,
            kl=np.zeros(len(nll)),
            agree=np.ones(len(nll), dtype=np.bool_),
            document_bytes=document_bytes,
        )

    @property
    def tokens(self) -> int:
        """The number of scored tokens."""
        return len(self.document)

    @property
    def documents(self) -> int:
        """The number of held-out documents."""
        return len(self.document_bytes)

    @property
    def shift(self) -> Float64[np.ndarray, " n"]:
        """The model's probability of the true token less the reference's."""
        return np.exp(-self.nll) - np.exp(-self.reference_nll)

    def where(self, mask: Bool[np.ndarray, " n"]) -> TokenRecords:
        """Returns the records of some tokens, documents without any left out.

        Exactness: bytes are those of whole documents, so a mask that cuts documents leaves none to count bits by.
        """
        present, document = np.unique(self.document[mask], return_inverse=True)
        columns = {
            name: getattr(self, name)[mask] for name, _, _ in _COLUMNS[1:-1]
        }  # fmt: skip
        return TokenRecords(
            document=document.astype(np.int32),
            document_bytes=self.document_bytes[present],
            **columns,
        )

    def document_sums(
        self, values: Num[np.ndarray, " n"] | Bool[np.ndarray, " n"]
    ) -> Float64[np.ndarray, " documents"]:
        """Returns the sum of a per-token column over each document."""
        weights = values.astype(np.float64)
        return np.bincount(self.document, weights=weights, minlength=self.documents)


def _column(name: str, values: np.ndarray, kinds: str, dtype: type) -> np.ndarray:
    if values.ndim != 1 or values.dtype.kind not in kinds:
        raise ValueError(
            f"TokenRecords.{name}: expected one axis of {np.dtype(dtype).name}, was {values.dtype} {values.shape}"
        )
    if not values.size:
        raise ValueError(f"TokenRecords.{name}: is empty, expected at least one entry")
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        raise ValueError(
            f"TokenRecords.{name}: {bad.size} of {values.size} values are not finite, "
            f"the first at {bad[0]} is {values[bad[0]]}"
        )
    kept: np.ndarray = values.astype(dtype)
    kept.setflags(write=False)
    return kept


def _check_documents(document: np.ndarray, document_bytes: np.ndarray) -> None:
    documents = len(document_bytes)
    if document.min() < 0 or document.max() >= documents:
        raise ValueError(
            f"TokenRecords.document: ranges over {document.min()}..{document.max()}, "
            f"expected 0..{documents - 1} (document_bytes has {documents})"
        )
    for what, amounts in (
        ("UTF-8 bytes", document_bytes),
        ("scored tokens", np.bincount(document, minlength=documents)),
    ):
        without = np.flatnonzero(amounts <= 0)
        if without.size:
            raise ValueError(
                f"TokenRecords.document_bytes: document {without[0]} has no {what} ({without.size} such): leave it out"
            )
