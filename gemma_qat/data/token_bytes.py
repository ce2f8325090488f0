"""How many bytes of text each token stands for: what turns nats per token into bits per byte."""

from __future__ import annotations

import numpy as np

from gemma_qat.data.tokenizer import SPACE_MARK, Tokenizer


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """Returns the UTF-8 bytes of every token, int64 [V]; control tokens stand for none.

    Exactness: the bytes of a document's tokens add up to the bytes of the document.
    """
    sizes = []
    for piece in tokenizer.pieces():
        if piece.kind == "byte":
            sizes.append(1)
        elif piece.kind in ("control", "unknown"):
            sizes.append(0)
        else:
            sizes.append(len(piece.text.replace(SPACE_MARK, " ").encode("utf-8")))
    return np.asarray(sizes, np.int64)
