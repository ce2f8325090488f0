"""Nothing was lost on the way: a file read back and compared with what was to be written."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from gemma_qat.checkpoint.source import Reading
from gemma_qat.errors import nearest
from gemma_qat.export.artifact import Artifact
from gemma_qat.export.gguf import artifact_keys, float_type_of, write_gguf
from gemma_qat.export.gguf_grids import as_blocks
from gemma_qat.export.gguf_keys import rope_factors
from gemma_qat.export.gguf_map import ROPE_FACTORS
from gemma_qat.export.gguf_read import open_contents
from gemma_qat.models import declare, static_scale_paths
from gemma_qat.numerics import QArray


def compare(
    artifact: Artifact,
    read: Mapping[str, QArray | np.ndarray],
    form: Callable[[str, QArray], QArray] = lambda path, q: q,
    left_out: Collection[str] = (),
) -> dict[str, int]:
    """Returns how many elements of `read` differ from the artifact's, and how many arrays were compared.

    Keys: `differing_codes`, `differing_scales`, `differing_floats`, `tensors`. Scales and floats are compared as bits,
    so that -0 is not 0; a float array read in half precision is compared with the artifact's rounded to it.
    `form` says what the file holds of a path's codes, `left_out` what it does not hold. One array of `read` is looked
    up at a time.

    Raises: ValueError naming an array that is only on one side, or quantized on one side only, or
        of another shape.
    """
    written: dict[str, Any] = {**artifact.quantized, **artifact.floats}
    written = {path: array for path, array in written.items() if path not in left_out}
    for path in dict.fromkeys([*written, *read]):  # names only: `read` may read when it is asked
        if path not in read or path not in written:
            side = "written but not read" if path in written else "read but never written"
            close = nearest(path, read if path in written else written)
            raise ValueError(f"{path}: {side} (nearest: {close or 'none'})")
    counts = {"differing_codes": 0, "differing_scales": 0, "differing_floats": 0}
    for path, expected in written.items():
        found: Any = read[path]
        expected = form(path, expected) if isinstance(expected, QArray) else expected
        if _kind(expected) != _kind(found):
            raise ValueError(f"{path}: {_kind(found)} read, {_kind(expected)} expected")
        if isinstance(expected, QArray):
            counts["differing_codes"] += _differing(expected.codes, found.codes)
            counts["differing_scales"] += _differing(expected.scale, found.scale)
        else:
            rounded = np.asarray(expected, np.float32).astype(found.dtype)
            counts["differing_floats"] += _differing(rounded, found)
    return {**counts, "tensors": len(written)}


def verify_gguf(artifact: Artifact, path: Path, *, float_type: str | None = None) -> dict[str, int]:
    """Returns `compare` of a GGUF file, all differences zero; deletes nothing. Arrays are read one at a time.

    Raises: ValueError when a code, scale, float or key/value of the file is not the artifact's, or
        when it cannot be read at all.
    """
    expected = artifact_keys(artifact, float_type or float_type_of(artifact.recipe))
    declared = declare(artifact.config)
    with open_contents(path) as contents:
        _refuse_keys(path, dict(contents.keys), expected)
        source = contents.source
        divisors = (rope_factors(source.config), rope_factors(artifact.config))
        if "full" in artifact.config.layer_kinds and not np.array_equal(*divisors):
            raise ValueError(f"{path}: {ROPE_FACTORS} is not what was to be written")
        counts = compare(
            artifact, Reading(source), lambda path, q: as_blocks(q, declared[path])[0],
            left_out=static_scale_paths(artifact.plans),
        )  # fmt: skip
    wrong = {name: n for name, n in counts.items() if n and name != "tensors"}
    if wrong:
        found = ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in wrong.items())
        raise ValueError(f"{path}: {found} among {counts['tensors']} arrays")
    return counts


def _refuse_keys(path: Path, keys: dict[str, Any], expected: Mapping[str, Any]) -> None:
    for key, value in expected.items():
        if not _same(keys.pop(key, None), value):
            raise ValueError(f"{path}: key {key} is not what was to be written")
    if keys:
        raise ValueError(f"{path}: key {next(iter(keys))} was never written")


def export_gguf(
    artifact: Artifact,
    out: Path,
    *,
    float_type: str | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> dict[str, int]:
    """Writes a GGUF file, reads it back, compares everything, and only then lets it appear as
    `out`.

    Returns {"bytes", "tensors", "rounded_scales"}: see `write_gguf`.
    Raises: InputError for what GGUF cannot carry; ValueError when the file is not what was to be
        written. `out` is then as it was before.
    """
    return write_gguf(
        artifact,
        out,
        float_type=float_type,
        verify=lambda partial: verify_gguf(artifact, partial, float_type=float_type),
        progress=progress,
    )


def _differing(a: Any, b: Any) -> int:
    return int(np.count_nonzero(_bits(np.asarray(a)) != _bits(np.asarray(b))))


def _bits(x: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
    return np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}")


def _same(found: Any, value: Any) -> bool:
    """Whether a value read is the one given; floats are stored as float32."""
    if isinstance(value, list):
        same_length = isinstance(found, list) and len(found) == len(value)
        return same_length and all(map(_same, found, value))
    if isinstance(value, float) and isinstance(found, float):
        return bool(np.float32(found) == np.float32(value))
    return type(found) is type(value) and found == value


def _kind(x: Any) -> str:
    return f"{'codes' if isinstance(x, QArray) else 'floats'} of shape {tuple(x.shape)}"
