"""Reading Hugging Face safetensors directories of Gemma 4 text decoders, tensor by tensor.

Multimodal towers are skipped by name, unused K/V tensors of KV-sharing layers and a stored copy of a tied head are
tolerated; every other tensor must be used, and every declared parameter must be there in the right shape.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gemma_qat.checkpoint.hf_config import read_config
from gemma_qat.checkpoint.maps import PREFIXES, TOWERS, foreign, is_dead
from gemma_qat.errors import InputError, nearest
from gemma_qat.models.config import ModelConfig
from gemma_qat.models.declare import declare


class TensorFiles:
    """The tensors of one directory, single file or sharded with an index; read one at a time."""

    def __init__(self, directory: Path) -> None:
        """Opens the directory's safetensors files and lists their tensors.

        Raises: FileNotFoundError when there are none; InputError naming the file that is truncated, corrupt or missing.
        """
        self._stack = contextlib.ExitStack()
        self._handles: dict[str, Any] = {}
        self.names: dict[str, str] = {}
        for file in _files(directory):
            for name in self._open(directory / file).keys():  # noqa: SIM118 (not a mapping)
                if name in self.names:
                    raise InputError(
                        f"{directory}: tensor {name} is in two files, {self.names[name]} and {file}"
                    )
                self.names[name] = file
        self.directory = directory

    def _open(self, path: Path) -> Any:
        from safetensors import SafetensorError, safe_open

        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file, though the index names it")
        try:
            handle = self._stack.enter_context(safe_open(path, framework="numpy"))
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: not a readable safetensors file ({error})") from None
        self._handles[path.name] = handle
        return handle

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor without reading it."""
        return tuple(self._handles[self.names[name]].get_slice(name).get_shape())

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor."""
        return self._handles[self.names[name]].get_tensor(name)

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def _files(directory: Path) -> list[str]:
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            files = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        except (
            UnicodeDecodeError,
            json.JSONDecodeError,
            KeyError,
            TypeError,
            AttributeError,
        ) as error:
            raise InputError(f"{index}: not a safetensors index ({error})") from None
        for file in files:
            if Path(str(file)).name != file or file in ("", ".."):
                raise InputError(f"{index}: {file!r} is not a plain file name")
        return files
    if (directory / "model.safetensors").is_file():
        return ["model.safetensors"]
    raise FileNotFoundError(
        f"{directory}: no model.safetensors and no model.safetensors.index.json"
    )


def read_parameters(
    directory: Path, config: ModelConfig | None = None
) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """Returns the decoder's config and its parameters by checkpoint path, in the dtype they are stored in.

    Raises: FileNotFoundError; InputError naming a missing, extra or misshaped tensor.
    """
    config = config or read_config(directory / "config.json")
    with TensorFiles(directory) as files:
        return config, dict(stream_parameters(files, config))


def stream_parameters(files: TensorFiles, config: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (checkpoint path, array) for every declared parameter; checks all names and shapes first."""
    names = _decoder_names(files)
    wanted = declare(config)
    _check_names(files, config, {foreign(p).name for p in wanted.values()}, names)
    for parameter in wanted.values():
        there = foreign(parameter)
        shape = files.shape(names[there.name])
        if shape != there.move.shape(parameter):
            raise InputError(
                f"{files.directory}: {names[there.name]} has shape {list(shape)}, "
                f"{list(there.move.shape(parameter))} expected by {config.name}"
            )
    for path, parameter in wanted.items():
        there = foreign(parameter)
        yield path, np.ascontiguousarray(there.move.read(files.read(names[there.name]), parameter))


def _decoder_names(files: TensorFiles) -> dict[str, str]:
    """Returns {name without prefix: name in the file} of the decoder's tensors; towers left out."""
    prefix = next((p for p in PREFIXES if any(n.startswith(p) for n in files.names)), None)
    if prefix is None:
        raise InputError(f"{files.directory}: no tensor starts with {' or '.join(PREFIXES)}")
    names = {}
    for name in files.names:
        if not name.startswith(TOWERS):
            names[name.removeprefix(prefix)] = name
    return names


def _check_names(
    files: TensorFiles, config: ModelConfig, wanted: set[str], names: Mapping[str, str]
) -> None:
    for name in sorted(wanted - names.keys()):
        raise InputError(
            f"{files.directory}: tensor {name} is missing (nearest: {nearest(name, names) or 'none'})"
        )
    for name in sorted(names.keys() - wanted):
        tied_copy = name == "lm_head.weight" and config.ties_head
        if not tied_copy and not is_dead(name, config):
            raise InputError(
                f"{files.directory}: unexpected tensor {names[name]} (nearest: {nearest(name, wanted) or 'none'})"
            )
