"""Our own float checkpoints, read an array at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gemma_qat.checkpoint.manifest import Manifest
from gemma_qat.checkpoint.store import check_arrays, read_arrays, read_manifest
from gemma_qat.errors import InputError
from gemma_qat.models import ModelConfig, abstract_parameters


def float_manifest(directory: Path) -> Manifest:
    """Returns the manifest of a native float checkpoint.

    Raises: FileNotFoundError; InputError for a checkpoint that is quantized.
    """
    manifest = read_manifest(directory)
    if manifest.kind != "float":
        raise InputError(
            f"{directory}: a float checkpoint expected, this one is {manifest.kind} ({manifest.recipe})"
        )
    return manifest


class NativeReading(Mapping[str, Any]):
    """The float32 arrays of a native float checkpoint by path, each read when it is asked for."""

    def __init__(self, directory: Path) -> None:
        """Looks at names and shapes; reads no array.

        Raises: FileNotFoundError; InputError for a checkpoint that is quantized, or not what its manifest says.
        """
        self.config: ModelConfig = float_manifest(directory).config
        self._abstract = abstract_parameters(self.config, {})
        parts = check_arrays(directory / "parameters", self._abstract)
        self._part = {path: part for part, paths in parts.items() for path in paths}

    def __getitem__(self, path: str) -> np.ndarray:
        array: np.ndarray = read_arrays(self._part[path], {path: self._abstract[path]})[path]
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._abstract)

    def __len__(self) -> int:
        return len(self._abstract)
