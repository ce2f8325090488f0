"""Reading Hugging Face safetensors directories of Gemma 4 text decoders, tensor by tensor.

Multimodal towers, unused K/V tensors of KV-sharing layers and a stored copy of a tied head are left out and said to
be; every other tensor must be used, and every declared parameter must be there in the right shape.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from gemma_qat.checkpoint.beside import beside, stays_inside
from gemma_qat.checkpoint.hf_config import quantization_method, read_config
from gemma_qat.checkpoint.maps import PREFIXES, TOWERS, Foreign, foreign, is_dead
from gemma_qat.checkpoint.moves import contiguous
from gemma_qat.checkpoint.safetensors_file import Entry, read_header, read_tensor
from gemma_qat.checkpoint.source import (
    TIED,
    UNUSED,
    LastRead,
    Leaf,
    Source,
)
from gemma_qat.errors import InputError, nearest
from gemma_qat.models.config import ModelConfig
from gemma_qat.models.declare import declare
from gemma_qat.quant.sites import Parameter

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SHOWN = 3
"""Names that are shown of each kind where several are wrong."""

FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


class TensorFiles:
    """The tensors of one directory, single file or sharded with an index; read one at a time."""

    def __init__(self, directory: Path, single: str | None = None) -> None:
        """Opens the directory's safetensors files, or one of another name, and lists their tensors.

        Raises: FileNotFoundError when there are none; InputError naming the file that is truncated, corrupt, missing
            or outside the directory, or the first tensor that is not where the index says.
        """
        self.directory = directory
        self.names: dict[str, str] = {}
        self._entries: dict[str, Entry] = {}
        self._files: dict[str, BinaryIO] = {}
        index = None if single else _index(directory)
        with contextlib.ExitStack() as stack:
            for file in [single or SINGLE] if index is None else sorted(set(index.values())):
                self._open(file, stack)
            if index is not None:
                self._compare(index)
            self._stack = stack.pop_all()

    def _open(self, file: str, stack: contextlib.ExitStack) -> None:
        path = self.directory / file
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file, though the index names it")
        if not stays_inside(path, self.directory):
            raise InputError(f"{path}: a link to {path.resolve()}, outside the directory")
        entries = read_header(path)
        for name in entries:
            if name in self.names:
                raise InputError(
                    f"{self.directory}: tensor {name} is in two files, {self.names[name]} and {file}"
                )
            self.names[name] = file
        self._entries |= entries
        # Kept open: what is read later is the file whose header was checked.
        self._files[file] = stack.enter_context(path.open("rb"))

    def _compare(self, index: Mapping[str, str]) -> None:
        wrong = sorted(
            n for n in index.keys() | self.names.keys() if index.get(n) != self.names.get(n)
        )
        if wrong:
            name, nowhere = wrong[0], "nowhere"
            raise InputError(
                f"{self.directory / INDEX}: {len(wrong)} tensors are not where it says, first {name}: "
                f"{index.get(name, nowhere)} in the index, {self.names.get(name, nowhere)} in the shards"
            )

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor without reading it."""
        return self._entries[name].shape

    def dtype(self, name: str) -> str:
        """Returns the format's name of a tensor's number type, such as BF16, without reading it."""
        return self._entries[name].dtype

    def place(self, name: str) -> tuple[str, int]:
        """Returns (file, offset): tensors sorted by it are read from front to back."""
        return self.names[name], self._entries[name].offset

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor."""
        where = f"{self.directory / self.names[name]}: {name}"
        return read_tensor(self._files[self.names[name]], self._entries[name], where)

    def raw(self, name: str) -> Leaf:
        """Returns a tensor under its own name, to be passed on as it is."""
        entry = self._entries[name]
        return Leaf(
            path=name, shape=entry.shape, dtype=entry.numpy.name, bytes=entry.bytes,
            read=lambda: self.read(name),
        )  # fmt: skip

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def _index(directory: Path) -> dict[str, str] | None:
    """Returns {tensor: file} of a sharded directory; None where one file has all of them."""
    index = directory / INDEX
    if index.is_file():
        try:
            where = dict(json.loads(index.read_text("utf-8"))["weight_map"].items())
            files = sorted(set(where.values()))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"{index}: not a safetensors index ({error})") from None
        for file in files:
            if Path(str(file)).name != file or file in ("", "..") or "\0" in file:
                raise InputError(f"{index}: {file!r} is not a plain file name")
        return where
    if (directory / SINGLE).is_file():
        return None
    raise FileNotFoundError(f"{directory}: no {SINGLE} and no {INDEX}")


@contextlib.contextmanager
def open_huggingface(directory: Path, config: ModelConfig | None = None) -> Iterator[Source]:
    """Gives the float decoder of a directory; names, shapes and number types are checked before it does.

    Raises: FileNotFoundError; InputError naming a missing, extra or misshaped tensor, or a quantization.
    """
    method = quantization_method(directory)
    if method is not None:
        raise InputError(
            f"{directory}: quantized (quant_method {method}), a float checkpoint expected"
        )
    config = config or read_config(directory / "config.json")
    with TensorFiles(directory) as files:
        names = _decoder_names(files)
        wanted = declare(config)
        places = {path: foreign(parameter) for path, parameter in wanted.items()}
        left = _left(files, config, {place.name for place in places.values()}, names)
        read = LastRead(files.read, [names[p.name] for p in places.values() if p.move.parts > 1])
        leaves = [_leaf(wanted[path], place, files, names, read) for path, place in places.items()]
        leaves.sort(key=lambda leaf: files.place(names[places[leaf.path].name]))
        yield Source(
            format="safetensors", config=config, leaves=tuple(leaves), left=left,
            carried=tuple(files.raw(name) for name, what in left.items() if what not in (UNUSED, TIED)),
            beside=beside(directory),
        )  # fmt: skip


def _leaf(
    parameter: Parameter, place: Foreign, files: TensorFiles, names: Mapping[str, str],
    read: LastRead,
) -> Leaf:  # fmt: skip
    name = names[place.name]
    shape, dtype = files.shape(name), files.dtype(name)
    if shape != place.move.shape(parameter):
        raise InputError(
            f"{files.directory}: {name} has shape {list(shape)}, {list(place.move.shape(parameter))} expected"
        )
    if dtype not in FLOATS:
        raise InputError(
            f"{files.directory}: {name} is stored as {dtype}, one of {', '.join(FLOATS)} expected"
        )
    size = parameter.size * (4 if dtype == "F32" else 2)
    return Leaf(
        path=parameter.path, shape=parameter.shape, dtype=FLOATS[dtype], bytes=size,
        read=lambda: contiguous(place.move.read(read(name), parameter)),
    )  # fmt: skip


def read_parameters(
    directory: Path, config: ModelConfig | None = None
) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """Returns the decoder's config and its parameters by checkpoint path, in the dtype they are stored in.

    Raises: FileNotFoundError; InputError as `open_huggingface` does.
    """
    with open_huggingface(directory, config) as source:
        read = {leaf.path: np.asarray(leaf.read()) for leaf in source.leaves}
        return source.config, {path: read[path] for path in declare(source.config)}


def _decoder_names(files: TensorFiles) -> dict[str, str]:
    """Returns {name without prefix: name in the file} of the decoder's tensors; towers left out."""
    prefix = next((p for p in PREFIXES if any(n.startswith(p) for n in files.names)), None)
    if prefix is None:
        raise InputError(f"{files.directory}: no tensor starts with {' or '.join(PREFIXES)}")
    own = (name for name in files.names if not name.startswith(tuple(TOWERS)))
    return {name.removeprefix(prefix): name for name in own}


def _left(
    files: TensorFiles, config: ModelConfig, wanted: set[str], names: Mapping[str, str]
) -> dict[str, str]:
    """Returns what no parameter is made of, by name in the file; refuses names that are missing or not known."""
    left = {
        name: what for name in files.names for start, what in TOWERS.items() if name.startswith(start)
    }  # fmt: skip
    extra = []
    for name in sorted(names.keys() - wanted):
        if name == "lm_head.weight" and config.ties_head:
            left[names[name]] = TIED
        elif is_dead(name, config):
            left[names[name]] = UNUSED
        else:
            extra.append(name)
    _refuse_other_names(files.directory, sorted(wanted - names.keys()), extra, wanted, names)
    return left


def _refuse_other_names(
    directory: Path, missing: Sequence[str], extra: Sequence[str],
    wanted: Collection[str], names: Mapping[str, str],
) -> None:  # fmt: skip
    """Raises InputError in one line: of a single wrong name what is like it, of several how many and the first."""
    if len(missing) + len(extra) > 1:
        found = {"missing": missing, "unexpected": [names[name] for name in extra]}
        said = [f"{len(n)} tensors {what} ({_some(n)})" for what, n in found.items() if n]
        raise InputError(f"{directory}: {', '.join(said)}")
    for name in missing:
        raise InputError(
            f"{directory}: tensor {name} is missing (nearest: {nearest(name, names) or 'none'})"
        )
    for name in extra:
        raise InputError(
            f"{directory}: unexpected tensor {names[name]} (nearest: {nearest(name, wanted) or 'none'})"
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
