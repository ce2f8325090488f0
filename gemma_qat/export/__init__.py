"""Files other programs read, written from codes and scales that are never derived again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from gemma_qat.checkpoint.beside import Beside, chat_template
from gemma_qat.errors import InputError, unknown

# What is written.
from gemma_qat.export.artifact import Artifact, Vocabulary

# Writing, reading, comparing.
from gemma_qat.export.check import compare, export_gguf, verify_gguf
from gemma_qat.export.compressed_read import open_compressed_tensors
from gemma_qat.export.compressed_tensors import export_compressed_tensors
from gemma_qat.export.figures import figures, model_of
from gemma_qat.export.gguf import write_gguf
from gemma_qat.export.gguf_read import looks_like_gguf, open_gguf, read_gguf
from gemma_qat.export.hub import HubOptions
from gemma_qat.export.huggingface import export_huggingface
from gemma_qat.export.litert import Lengths, export_litert, looks_like_litert, open_litert
from gemma_qat.export.mobile import export_mobile
from gemma_qat.export.mobile_read import open_mobile
from gemma_qat.export.source import artifact_of, export_native

Exporter = Callable[..., dict[str, int]]
"""Called with (artifact, out), hub formats with `HubOptions` too, litert with `Lengths`: writes it, checked by reading
it back; returns at least {"bytes", "tensors"}."""

HUB_EXPORTERS: dict[str, Exporter] = {
    "compressed-tensors": export_compressed_tensors,
    "huggingface": export_huggingface,
    "mobile": export_mobile,
}
"""Those that write a directory as the hub has them."""

EXPORTERS: dict[str, Exporter] = {
    "gguf": export_gguf,
    "litert": export_litert,
    "native": export_native,
    **HUB_EXPORTERS,
}


def exporter_named(name: str) -> Exporter:
    """Returns the exporter of format `name`.

    Raises: InputError naming the nearest formats.
    """
    if name not in EXPORTERS:
        raise unknown("export format", name, EXPORTERS)
    return EXPORTERS[name]


def export_checkpoint(
    directory: Path,
    out: Path,
    *,
    format: str,
    tokenizer: Vocabulary | None = None,
    masters: bool = False,
    hub: HubOptions = HubOptions(),
    lengths: Lengths = Lengths(),
    beside: Beside = Beside(),
) -> dict[str, int]:
    """Writes the checkpoint in `directory` in any format; `beside` goes along unless `hub` names other files.

    Raises: InputError for an unknown format, options of the hub or of LiteRT for another one, or what the exporter
        refuses.
    """
    exporter = exporter_named(format)
    if format not in HUB_EXPORTERS and hub != HubOptions():
        raise InputError(f"format {format} takes no dtype, tables, files or report")
    if format != "litert" and lengths != Lengths():
        raise InputError(f"format {format} has no cache of a fixed length; litert has one")
    artifact = artifact_of(directory, tokenizer, masters=masters)
    if format in HUB_EXPORTERS:
        left_out = beside.towers.left if beside.towers and not hub.towers else {}
        files = hub.beside or beside.files
        return exporter(artifact, out, dataclasses.replace(hub, beside=files, left_out=left_out))
    template = chat_template(beside.files)
    artifact = dataclasses.replace(artifact, chat_template=template, beside=beside)
    return export_litert(artifact, out, lengths) if format == "litert" else exporter(artifact, out)


__all__ = [
    "EXPORTERS",
    "HUB_EXPORTERS",
    "Artifact",
    "Exporter",
    "HubOptions",
    "Lengths",
    "Vocabulary",
    "artifact_of",
    "compare",
    "export_checkpoint",
    "export_compressed_tensors",
    "export_gguf",
    "export_huggingface",
    "export_litert",
    "export_mobile",
    "export_native",
    "exporter_named",
    "figures",
    "looks_like_gguf",
    "looks_like_litert",
    "model_of",
    "open_compressed_tensors",
    "open_gguf",
    "open_litert",
    "open_mobile",
    "read_gguf",
    "verify_gguf",
    "write_gguf",
]
