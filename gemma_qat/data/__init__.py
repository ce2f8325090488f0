"""Text -> tokens -> packed rows -> deterministic batches, on one machine or on many hosts.

grain, tensorflow_datasets, pyarrow and sentencepiece are imported when a loader, a dataset or a
tokenizer is made, so importing this package costs numpy only.
"""

# Batches that can stop and go on.
from gemma_qat.data.blend import Blend, RowSet

# Conversations.
from gemma_qat.data.chat import SYMBOLS, chat_spans
from gemma_qat.data.datasets import open_source, tfds_source, write_source

# Documents -> ids -> rows of one length, in memory or on disk.
from gemma_qat.data.encode import Encoded, encoder
from gemma_qat.data.kinds import KINDS, Kind, open_kind
from gemma_qat.data.loader import Batch, Loader, make_loader
from gemma_qat.data.packing import Rows, efficiency, pack, targets, tokenize

# All of it for the standard library, in one call.
from gemma_qat.data.prepare import Prepared, prepare_stdlib

# Where documents come from.
from gemma_qat.data.records import Format, Record, Source

# Text -> ids and back.
from gemma_qat.data.sentencepiece_model import SentencePieceTokenizer, train_tokenizer
from gemma_qat.data.sources import (
    array_record_source,
    jsonl_source,
    parquet_source,
    text_source,
)
from gemma_qat.data.stdlib_corpus import SPLITS, Document, by_split, collect, split_of
from gemma_qat.data.store import Plan, StoredRows, stored_rows
from gemma_qat.data.tokenizer import Piece, Tokenizer

__all__ = [
    "KINDS",
    "SPLITS",
    "SYMBOLS",
    "Batch",
    "Blend",
    "Document",
    "Encoded",
    "Format",
    "Kind",
    "Loader",
    "Piece",
    "Plan",
    "Prepared",
    "Record",
    "RowSet",
    "Rows",
    "SentencePieceTokenizer",
    "Source",
    "StoredRows",
    "Tokenizer",
    "array_record_source",
    "by_split",
    "chat_spans",
    "collect",
    "efficiency",
    "encoder",
    "jsonl_source",
    "make_loader",
    "open_kind",
    "open_source",
    "pack",
    "parquet_source",
    "prepare_stdlib",
    "split_of",
    "stored_rows",
    "targets",
    "text_source",
    "tfds_source",
    "tokenize",
    "train_tokenizer",
    "write_source",
]
