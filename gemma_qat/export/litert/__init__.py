"""LiteRT: a model of the mobile schema as the runtime of phones reads it, and that runtime on this machine's CPU."""

from __future__ import annotations

from gemma_qat.export.litert.graph import Lengths
from gemma_qat.export.litert.read import looks_like_litert, open_litert
from gemma_qat.export.litert.run import LiteRTModel
from gemma_qat.export.litert.write import as_written, export_litert, model_bytes, write_model

__all__ = [
    "Lengths",
    "LiteRTModel",
    "as_written",
    "export_litert",
    "looks_like_litert",
    "model_bytes",
    "open_litert",
    "write_model",
]
