"""Reading a hub directory whose sites are quantized: names looked up, used once, and what is left accounted for."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gemma_qat.checkpoint.huggingface import TensorFiles
from gemma_qat.checkpoint.maps import PREFIXES, TOWERS, foreign, is_dead
from gemma_qat.checkpoint.source import UNUSED, Leaf
from gemma_qat.errors import InputError, nearest
from gemma_qat.models import ModelConfig, fit
from gemma_qat.numerics import Grid, QArray
from gemma_qat.quant import Parameter, Plans, families_of

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class HubTensors:
    """The decoder's tensors of an opened directory, by names without prefix; remembers which were used."""

    def __init__(self, files: TensorFiles) -> None:
        """Finds the prefix of the decoder's tensors.

        Raises: InputError when none has one.
        """
        found = next((p for p in PREFIXES if any(n.startswith(p) for n in files.names)), None)
        if found is None:
            raise InputError(f"{files.directory}: no tensor starts with {' or '.join(PREFIXES)}")
        self.files, self.prefix = files, found
        self.left = {
            name: what
            for name in files.names
            for start, what in TOWERS.items()
            if name.startswith(start)
        }
        self._names = {
            name.removeprefix(found): name for name in files.names if name not in self.left
        }
        self._used: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def use(self, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> str:
        """Returns the full name of a tensor, of which shape and dtype have been checked.

        Raises: InputError naming the tensor when it is missing, misshaped or of another dtype.
        """
        where = self.files.directory
        if name not in self._names:
            close = nearest(name, self._names) or "none"
            raise InputError(f"{where}: tensor {name} is missing (nearest: {close})")
        full = self._names[name]
        found = self.files.shape(full)
        if found != shape:
            raise InputError(f"{where}: {full} has shape {list(found)}, {list(shape)} expected")
        if self.dtype(name) not in dtypes:
            raise InputError(
                f"{where}: {full} is {self.dtype(name)}, {' or '.join(dtypes)} expected"
            )
        self._used.add(name)
        return full

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor that is there."""
        return self.files.shape(self._names[name])

    def dtype(self, name: str) -> str:
        """Returns the dtype of a tensor that is there, by its name in safetensors."""
        return self.files.dtype(self._names[name])

    def rest(self, config: ModelConfig) -> dict[str, str]:
        """Returns {full name: what it is} of tensors that no parameter is made of.

        Raises: InputError for a tensor that is none of: a tower's, an unused key or value projection.
        """
        left = dict(self.left)
        for name in self._names.keys() - self._used:
            module = re.sub(r"\.(weight|weight_\w+|\w+_scale)$", "", name)
            if not is_dead(f"{module}.weight", config):
                close = nearest(name, self._used) or "none"
                raise InputError(
                    f"{self.files.directory}: unexpected tensor {self._names[name]} (nearest: {close})"
                )
            left[self._names[name]] = UNUSED
        return left

    def carried(self) -> tuple[Leaf, ...]:
        """Returns the tensors of the towers, to be passed on as they are."""
        return tuple(self.files.raw(name) for name in self.left)

    def floats(self, parameter: Parameter) -> Leaf:
        """Returns a parameter that stays in float."""
        there = foreign(parameter)
        full = self.use(there.name, there.move.shape(parameter), tuple(_DTYPES))
        files = self.files

        def read() -> np.ndarray:
            return np.ascontiguousarray(there.move.read(files.read(full), parameter))

        kind = _DTYPES[self.dtype(there.name)]
        width = 4 if kind == "float32" else 2
        return Leaf(
            path=parameter.path, shape=parameter.shape, dtype=kind,
            bytes=parameter.size * width, read=read,
        )  # fmt: skip

    def scalar(self, name: str, path: str) -> Leaf:
        """Returns a static scale, of shape (1,)."""
        shape = self.shape(name)
        if shape not in ((), (1,)):
            shape = ()  # refused by what `use` says
        full, files = self.use(name, shape, tuple(_DTYPES)), self.files

        def read() -> np.ndarray:
            return np.asarray(files.read(full), np.float32).reshape(1)

        return Leaf(path=path, shape=(1,), dtype="float32", bytes=4, read=read)


def codes_leaf(parameter: Parameter, grid: Grid, size: int, read: Callable[[], QArray]) -> Leaf:
    """Returns a quantized parameter."""
    return Leaf(
        path=parameter.path, shape=parameter.shape, dtype=f"int{grid.number.bits}", bytes=size,
        read=read,
    )  # fmt: skip


def quantization_config(directory: Path, method: str) -> dict[str, Any]:
    """Returns the `quantization_config` of a directory's config.json.

    Raises: FileNotFoundError; InputError when there is none, or one of another method.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a Hugging Face directory has a config.json")
    try:
        raw = json.loads(path.read_text("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error})") from None
    found = raw.get("quantization_config") if isinstance(raw, dict) else None
    if not isinstance(found, dict) or found.get("quant_method") != method:
        given = found.get("quant_method") if isinstance(found, dict) else None
        raise InputError(f"{path}: quant_method {method} expected, {given or 'none'} given")
    return found


def recipe_of(config: ModelConfig, plans: Plans, otherwise: str) -> str | None:
    """Returns the recipe of ours that gives exactly these plans; None when there are no plans at all."""
    if not plans:
        return None
    # A head of its own that stays in float is a copy to every recipe but those that untie it themselves.
    tied = dataclasses.replace(config, ties_head=True)
    for name in ("mobile", "mobile_like", "w4a16"):
        if config.family in families_of(name) and _gives(tied, name, plans):
            return name
    return otherwise


def _gives(config: ModelConfig, name: str, plans: Plans) -> bool:
    try:
        return fit(config, name).plans == plans
    except InputError:  # a recipe that this model cannot have is not the one it has
        return False
