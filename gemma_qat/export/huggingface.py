"""Float safetensors that transformers reads: masters as they are, or the values that stored codes stand for.

Quantized sites hold code * scale, in float32 exactly what training multiplied with, in bfloat16 rounded once more. The
codes themselves are not in these files; what that means for a quantizer that reads them is in the model card, and
`requantized` counts it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from gemma_qat.checkpoint.hf_config import read_config
from gemma_qat.checkpoint.huggingface import TensorFiles
from gemma_qat.checkpoint.maps import PREFIXES
from gemma_qat.checkpoint.safetensors_file import Tensor, of_leaf
from gemma_qat.export.artifact import Artifact
from gemma_qat.export.hub import HubOptions, write_directory
from gemma_qat.export.hub_config import config_json
from gemma_qat.export.hub_floats import fused, tensor_of
from gemma_qat.export.hub_rows import PREFIX, on_host
from gemma_qat.export.prepared import Values
from gemma_qat.models.declare import declare
from gemma_qat.numerics import QArray, quantize


def export_huggingface(
    artifact: Artifact, out: Path, options: HubOptions = HubOptions()
) -> dict[str, int]:
    """Writes a float directory, reads it back, and only then lets it appear.

    Towers are written beside the decoder, bit for bit. Returns {"bytes", "tensors", "differing_floats"}.
    Raises: ValueError when what was written reads back as something else; `out` is then as it was before.
    """
    tensors = [
        tensor_of(name, parameters, options.stored, lambda path: value_of(artifact, path))
        for name, parameters in fused(declare(artifact.config).values()).items()
    ]
    if options.towers:
        tensors = [_among_towers(tensor) for tensor in tensors]
        tensors += [of_leaf(leaf) for leaf in options.towers]
    return write_directory(
        artifact, out, tensors, format="huggingface", options=options,
        verify=lambda directory: _verify(artifact, tensors, directory),
    )  # fmt: skip


def _among_towers(tensor: Tensor) -> Tensor:
    """A tensor of a text-only file as a file with towers names it."""
    name = (
        tensor.name.replace(PREFIX, PREFIXES[0], 1)
        if tensor.name.startswith(PREFIX)
        else tensor.name
    )
    return dataclasses.replace(tensor, name=name)


def _verify(artifact: Artifact, tensors: Sequence[Tensor], directory: Path) -> dict[str, int]:
    """Returns {"differing_floats": 0}.

    Raises: ValueError when the model, a name or a value is not what was to be written.
    """
    config = read_config(directory / "config.json")
    if config_json(config) != config_json(artifact.config):
        raise ValueError(f"{directory}: config.json describes another model than was written")
    different = 0
    with TensorFiles(directory) as files:
        if set(files.names) != {tensor.name for tensor in tensors}:
            raise ValueError(f"{directory}: other tensors read than were written")
        for tensor in tensors:
            found, expected = files.read(tensor.name), tensor.make()
            if (found.dtype, found.shape) != (expected.dtype, expected.shape):
                raise ValueError(f"{tensor.name}: {found.dtype} {found.shape} read")
            kind = f"u{found.dtype.itemsize}"
            different += int(np.count_nonzero(found.view(kind) != expected.view(kind)))
    if different:
        raise ValueError(f"{directory}: {different} differing floats")
    return {"differing_floats": different}


def value_of(artifact: Artifact, path: str) -> np.ndarray:
    """Returns an array of the model in float32: as it is, or code * scale."""
    q = artifact.quantized.get(path)
    if q is None:
        return np.asarray(artifact.floats[path], np.float32)
    return np.asarray(Values(q))


def requantized(artifact: Artifact, dtype: str = "float32") -> Mapping[str, int]:
    """Returns how many codes change when the recipe's quantizer derives scales from the values in `dtype`.

    Keys: `codes` in all, `changed` with scales derived anew. With the stored scales none change.
    """
    changed = codes = 0
    for q in artifact.quantized.values():
        again = _again(_on_host(q), dtype)
        changed += int(np.count_nonzero(np.asarray(again.codes) != np.asarray(q.codes)))
        codes += int(np.asarray(q.codes).size)
    return {"codes": codes, "changed": changed}


def _on_host(q: QArray) -> QArray:
    return QArray(on_host(q.codes), on_host(q.scale), q.grid, q.reduced)


@functools.partial(jax.jit, static_argnums=1)
def _again(q: QArray, dtype: str) -> QArray:
    kind = jnp.finfo(dtype)
    # Not by casts there and back: XLA takes such a pair away.
    values = jax.lax.reduce_precision(q.dequantize(), kind.nexp, kind.nmant)
    return quantize(values, q.grid, q.reduced)
