"""From a saved checkpoint to what exporters are given, and to a packed checkpoint of our own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from gemma_qat.checkpoint.native import load_parameters, load_quantized, save_packed
from gemma_qat.export.artifact import Artifact, Vocabulary
from gemma_qat.export.check import compare
from gemma_qat.models import Fitted, float_parameters


def artifact_of(directory: Path, tokenizer: Vocabulary | None = None) -> Artifact:
    """Returns the stored codes and scales of a QAT or packed checkpoint and what stays in float.

    Raises: FileNotFoundError; InputError for a float checkpoint, or one that cannot be restored.
    """
    manifest, quantized = load_quantized(directory)
    _, parameters = load_parameters(directory)
    floats = float_parameters(parameters, manifest.fitted)
    return Artifact(
        config=manifest.config,
        recipe=manifest.fitted.recipe,
        plans=manifest.plans,
        quantized=quantized,
        floats={path: np.asarray(leaf) for path, leaf in floats.items()},
        tokenizer=tokenizer,
        imported=manifest.imported,
    )


def export_native(artifact: Artifact, out: Path) -> dict[str, int]:
    """Writes a packed checkpoint of our own, reads it back and compares; returns {"bytes", "tensors"}.

    Raises: ValueError when what is read is not what was to be written; `out` is then removed again.
    """
    fitted = Fitted(config=artifact.config, recipe=artifact.recipe, plans=artifact.plans)
    save_packed(
        out,
        artifact.quantized,
        artifact.floats,
        fitted,
        verify=_verified(artifact),
        imported=artifact.imported,
    )
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    return {"bytes": size, "tensors": len(artifact.quantized) + len(artifact.floats)}


def _verified(artifact: Artifact) -> Callable[[Path], None]:
    def verify(directory: Path) -> None:
        again = artifact_of(directory)
        counts = compare(artifact, {**again.quantized, **again.floats})
        wrong = {name: n for name, n in counts.items() if n and name != "tensors"}
        if wrong:
            raise ValueError(f"{directory}: read back with {wrong}")

    return verify
