"""What a reconstruction leaves in the folder of its run, so that a run that was stopped goes on with the next layer.

blockwise.json                  how it was made, and for every layer its error before and after
blockwise/LAYER.safetensors     the leaves of a layer that is done, until the run is
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gemma_qat.checkpoint.appear import appearing_file
from gemma_qat.checkpoint.safetensors_file import Tensor, read_header, read_tensor, write_file
from gemma_qat.checkpoint.store import write_json

Leaves = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rebuilt:
    """One layer's squared error over its target's squares, before its steps and after them."""

    layer: int
    before: float
    after: float


class RebuiltLayers:
    """The layers that are done, kept in the folder of a run; without a folder nothing is."""

    def __init__(self, folder: Path | None, made: Mapping[str, Any]) -> None:
        """`made` says how, as values for JSON: layers that were made otherwise are made again."""
        self._folder, self._made = folder, dict(made)
        self._rows: list[dict[str, Any]] = []
        self._kept = self._read()

    @property
    def errors(self) -> list[Rebuilt]:
        """Errors of the layers that were added."""
        names = [field.name for field in dataclasses.fields(Rebuilt)]
        return [Rebuilt(**{name: row[name] for name in names}) for row in self._rows]

    def take_up(self, index: int, start: Leaves) -> dict[str, np.ndarray] | None:
        """Returns the leaves of a layer that was kept and began with `start`; None to make it, and all after it."""
        kept = self._kept.get(index)
        if kept is None or kept.get("start") != _digest(start):
            self._kept = {}
            return None
        file = self._file(index)
        with file.open("rb") as content:
            return {n: read_tensor(content, e, str(file)) for n, e in read_header(file).items()}

    def keep(self, errors: Rebuilt, start: Leaves, leaves: Leaves) -> None:
        """Keeps a layer that is done: its leaves, and then the word that they are there."""
        self._rows.append({**dataclasses.asdict(errors), "start": _digest(start)})
        if self._folder is None:
            return
        if errors.layer not in self._kept:
            with appearing_file(self._file(errors.layer)) as file:
                write_file(file, [_tensor(name, leaves[name]) for name in sorted(leaves)])
        with appearing_file(self._folder / "blockwise.json") as file:
            write_json(file, {"kind": "blockwise", "made": self._made, "layers": self._rows})

    def _file(self, index: int) -> Path:
        assert self._folder is not None
        return self._folder / "blockwise" / f"{index}.safetensors"

    def _read(self) -> dict[int, dict[str, Any]]:
        if self._folder is None:
            return {}
        try:
            found = json.loads((self._folder / "blockwise.json").read_text("utf-8"))
            rows = {int(row["layer"]): row for row in found["layers"]}
        except (OSError, ValueError, KeyError, TypeError):
            return {}
        same = found.get("made") == json.loads(json.dumps(self._made))
        return {n: row for n, row in rows.items() if same and self._file(n).is_file()}


def forget_layers(folder: Path) -> None:
    """Deletes the leaves that a reconstruction kept in the folder of a run; what it measured stays."""
    shutil.rmtree(folder / "blockwise", ignore_errors=True)


def _tensor(name: str, leaf: Any) -> Tensor:
    array = np.asarray(leaf, np.float32)
    return Tensor(name=name, dtype="F32", shape=array.shape, make=lambda: array)


def _digest(leaves: Leaves) -> str:
    """A checksum of what a layer begins with."""
    found = 0
    for name in sorted(leaves):
        found = zlib.crc32(np.ascontiguousarray(leaves[name]).view(np.uint8).data, found)
    return f"{found:08x}"
