"""Text -> tokens -> packed rows -> deterministic batches, on one machine or on many hosts.

grain, tensorflow_datasets and sentencepiece are imported when a loader, a dataset or a tokenizer is
made, so importing this package costs numpy only.
"""

# Where text comes from.
# Batches that can stop and go on.
from gemma_qat.data.loader import Batch, Loader, make_loader

# Documents -> rows of one length.
from gemma_qat.data.packing import Rows, efficiency, pack, targets, tokenize

# All of it for the standard library, in one call.
from gemma_qat.data.prepare import Prepared, prepare_stdlib
from gemma_qat.data.sources import (
    Record,
    Source,
    jsonl_source,
    open_source,
    text_source,
    write_source,
)
from gemma_qat.data.stdlib_corpus import SPLITS, Document, collect, split_of

# Text -> ids and back.
from gemma_qat.data.tokenizer import Piece, Tokenizer, train_tokenizer

__all__ = [
    "SPLITS",
    "Batch",
    "Document",
    "Loader",
    "Piece",
    "Prepared",
    "Record",
    "Rows",
    "Source",
    "Tokenizer",
    "collect",
    "efficiency",
    "jsonl_source",
    "make_loader",
    "open_source",
    "pack",
    "prepare_stdlib",
    "split_of",
    "targets",
    "text_source",
    "tokenize",
    "train_tokenizer",
    "write_source",
]
