"""From a saved checkpoint to what exporters are given, and to a packed checkpoint of our own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gemma_qat.checkpoint.beside import run_of
from gemma_qat.checkpoint.manifest import Manifest
from gemma_qat.checkpoint.native import load_parameters, load_quantized, save_packed
from gemma_qat.checkpoint.store import read_manifest
from gemma_qat.errors import InputError
from gemma_qat.export.artifact import Artifact, Vocabulary
from gemma_qat.export.card import model_card
from gemma_qat.export.check import compare
from gemma_qat.export.hub import facts
from gemma_qat.models import Fitted, declare, float_parameters


def artifact_of(
    directory: Path, tokenizer: Vocabulary | None = None, *, masters: bool = False
) -> Artifact:
    """Returns the stored codes and scales of a checkpoint and what stays in float.

    A float checkpoint has no codes: all of it is in float. With `masters` so it is for a QAT checkpoint, whose masters
    are given instead of their codes.
    Raises: FileNotFoundError; InputError for a checkpoint that cannot be restored, or masters of a packed one.
    """
    manifest = read_manifest(directory)
    if manifest.kind == "packed" and masters:
        raise InputError(f"{directory}: a packed checkpoint has no masters")
    _, parameters = load_parameters(directory)
    if manifest.kind == "float" or masters:
        return _in_float(directory, manifest, parameters, tokenizer)
    _, quantized = load_quantized(directory)
    floats = float_parameters(parameters, manifest.fitted)
    return Artifact(
        config=manifest.config,
        recipe=manifest.fitted.recipe,
        plans=manifest.plans,
        quantized=quantized,
        floats={path: np.asarray(leaf) for path, leaf in floats.items()},
        tokenizer=tokenizer,
        imported=manifest.imported,
        provenance=provenance(directory, manifest),
    )


def _in_float(
    directory: Path,
    manifest: Manifest,
    parameters: Mapping[str, Any],
    tokenizer: Vocabulary | None,
) -> Artifact:
    return Artifact(
        config=manifest.config,
        recipe="float",
        plans={},
        quantized={},
        floats={path: np.asarray(parameters[path]) for path in declare(manifest.config)},
        tokenizer=tokenizer,
        provenance=provenance(directory, manifest),
    )


def provenance(directory: Path, manifest: Manifest) -> dict[str, Any]:
    """Returns what a checkpoint says of itself: kind, step, digest of its manifest, config of its run if any."""
    digest = hashlib.sha256((directory / "manifest.json").read_bytes()).hexdigest()
    found: dict[str, Any] = {
        "checkpoint": directory.name,
        "kind": manifest.kind,
        "trained with recipe": manifest.recipe or "float",
        "step": manifest.step,
        "sha256 of manifest.json": digest,
    }
    run = run_of(directory)
    file = run / "config.json" if run else None
    if file and file.is_file():
        try:
            found["run"] = json.loads(file.read_text("utf-8"))
        except ValueError as error:
            raise InputError(f"{file}: not JSON ({error})") from None
    return found


def export_native(artifact: Artifact, out: Path) -> dict[str, int]:
    """Writes a packed checkpoint of our own, reads it back and compares; returns {"bytes", "tensors"}.

    Raises: InputError for a float checkpoint; ValueError when what is read is not what was to be written; `out` is
        then removed again.
    """
    if not artifact.plans:
        raise InputError("native packed checkpoints hold codes; this checkpoint is float")
    fitted = Fitted(config=artifact.config, recipe=artifact.recipe, plans=artifact.plans)
    save_packed(
        out,
        artifact.quantized,
        artifact.floats,
        fitted,
        verify=_verified(artifact),
        imported=artifact.imported,
        beside=artifact.beside,
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
        towers = artifact.beside.towers
        said = facts(artifact, "native", "float32", {}, towers.left if towers else {})
        (directory / "README.md").write_text(
            model_card(artifact, format="native", facts=said), "utf-8"
        )

    return verify
