"""Files other programs read, written from codes and scales that are never derived again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from gemma_qat.errors import unknown

# What is written.
from gemma_qat.export.artifact import Artifact, Vocabulary

# Writing, reading, comparing.
from gemma_qat.export.check import compare, export_gguf, verify_gguf
from gemma_qat.export.gguf import write_gguf
from gemma_qat.export.gguf_read import looks_like_gguf, open_gguf, read_gguf
from gemma_qat.export.source import artifact_of, export_native

Exporter = Callable[[Artifact, Path], dict[str, int]]
"""Writes an artifact, checked by reading it back; returns at least {"bytes", "tensors"}."""

EXPORTERS: dict[str, Exporter] = {
    "gguf": export_gguf,
    "native": export_native,
}


def exporter_named(name: str) -> Exporter:
    """Returns the exporter of format `name`.

    Raises: InputError naming the nearest formats.
    """
    if name not in EXPORTERS:
        raise unknown("export format", name, EXPORTERS)
    return EXPORTERS[name]


__all__ = [
    "EXPORTERS",
    "Artifact",
    "Exporter",
    "Vocabulary",
    "artifact_of",
    "compare",
    "export_gguf",
    "export_native",
    "exporter_named",
    "looks_like_gguf",
    "open_gguf",
    "read_gguf",
    "verify_gguf",
    "write_gguf",
]
