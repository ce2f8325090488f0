"""A GGUF file of Gemma 4 as a source: which model and recipe it is, its arrays read one at a time.

The header is read first and the tensors it names are compared with those its key/values promise. Arrays are decoded
from the mapped file when they are asked for: codes stay codes, floats stay in the type they are stored in.

A file says of each tensor what grid it is on, and nothing of why. If the tensors are what one of our recipes makes of
the model it is that recipe: the one `gemma_qat.recipe` names when that fits, or the first of the table that does. A
file of another mix, or one whose activations were rounded with static scales it could not carry, gets plans made from
its tensors, and `gguf` for the recipe's name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from gemma_qat.checkpoint.source import Leaf, Source
from gemma_qat.errors import InputError, nearest
from gemma_qat.export.gguf_blocks import BLOCKS_NAMED, one_from_blocks
from gemma_qat.export.gguf_header import Header, TensorInfo, quoted, read_header
from gemma_qat.export.gguf_keys import ARCHITECTURE, RECIPE_KEY, config_of
from gemma_qat.export.gguf_map import ROPE_FACTORS, Tensor, tensors_of
from gemma_qat.export.gguf_tokenizer import tokenizer_files
from gemma_qat.models import SIZES, fit
from gemma_qat.models.config import ModelConfig
from gemma_qat.numerics import QArray
from gemma_qat.quant import RECIPE_NAMES, Plan, Plans, families_of

FROM_FILE = "gguf"
"""Name of the recipe of a file that no recipe of ours makes."""

_FLOATS: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
_KNOWN = ", ".join([*BLOCKS_NAMED, *_FLOATS])
_FEWEST = 10
"""Tensors of the plainest layer."""
_UNUSED = re.compile(r"blk\.(\d+)\.attn_(k|v|k_norm)\.weight")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contents:
    """A GGUF file, opened: its key/values, and what it is a source of."""

    keys: dict[str, Any]
    source: Source


def looks_like_gguf(path: Path) -> bool:
    """Returns whether a path is a GGUF file, by its first bytes or by its name."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return path.suffix == ".gguf" or file.read(4) == b"GGUF"


@contextlib.contextmanager
def open_gguf(path: Path) -> Iterator[Source]:
    """Gives a GGUF file as a source; its leaves can be read inside the block.

    Raises: FileNotFoundError; InputError in one line for a file that is not a Gemma 4 GGUF, or whose tensors are not
        the ones its key/values promise.
    """
    with open_contents(path) as contents:
        yield contents.source


@contextlib.contextmanager
def open_contents(path: Path) -> Iterator[Contents]:
    """Gives a GGUF file with its key/values; raises as `open_gguf` does."""
    header = read_header(path)
    found = header.keys.get("general.architecture")
    if found != ARCHITECTURE:
        raise InputError(
            f"{path}: architecture {quoted(str(found))} given, {ARCHITECTURE!r} expected"
        )
    data = _Mapped(path)
    try:
        yield Contents(keys=header.keys, source=_described(path, header, data))
    finally:
        data.close()


def read_gguf(path: Path) -> dict[str, QArray | np.ndarray]:
    """Returns all arrays of a GGUF file by our paths: `QArray` for ggml's blocks, else floats as stored.

    Raises: as `open_gguf`.
    Exactness: undoes `write_gguf` bit for bit.
    """
    with open_gguf(path) as source:
        return {leaf.path: leaf.read() for leaf in source.leaves}


class _Mapped:
    """The bytes of a file, mapped while it is open; pages that were read are given back."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._bytes: np.memmap | None = np.memmap(path, np.uint8, "r")

    def of(self, info: TensorInfo) -> np.ndarray:
        """Returns a view of a tensor's bytes.

        Raises: InputError when the file is closed.
        """
        if self._bytes is None:
            raise InputError(f"{self.path}: closed, {info.name} can no longer be read")
        return self._bytes[info.start : info.start + info.bytes]

    def forget(self, info: TensorInfo) -> None:
        """Gives back the memory of a tensor's pages."""
        mapped = None if self._bytes is None else self._bytes._mmap  # type: ignore[attr-defined]
        if mapped is not None and hasattr(mapped, "madvise"):
            first = -(-info.start // mmap.PAGESIZE) * mmap.PAGESIZE
            length = info.start + info.bytes - first
            if length > 0:
                mapped.madvise(mmap.MADV_DONTNEED, first, length)

    def close(self) -> None:
        """Ends the mapping once nobody holds a view."""
        self._bytes = None


def _described(path: Path, header: Header, data: _Mapped) -> Source:
    try:
        config = _config(header, data)
        wanted = tensors_of(config, header.tensors)
        left = _left(header, config, wanted)
        plans = _plans(header, wanted)
        in_order = sorted(wanted.values(), key=lambda tensor: header.tensors[tensor.name].start)
        leaves = [
            _leaf(header.tensors[tensor.name], tensor, index, data)
            for tensor in in_order
            for index in range(len(tensor.parameters))
        ]
        named = header.keys.get(RECIPE_KEY)
        recipe, plans = _recipe(config, plans, named if isinstance(named, str) else "")
    except (ValueError, FileNotFoundError) as error:
        raise InputError(f"{path}: {error}") from None
    except (ArithmeticError, LookupError, TypeError, AttributeError, MemoryError) as error:
        raise InputError(f"{path}: keys that do not fit together ({error})") from None
    return Source(
        format="gguf", config=config, leaves=tuple(leaves), recipe=recipe, plans=plans, left=left,
        made=tokenizer_files(header.keys),
    )  # fmt: skip


def _config(header: Header, data: _Mapped) -> ModelConfig:
    tensors = header.tensors
    if "token_embd.weight" not in tensors:
        raise InputError("tensor token_embd.weight: missing")
    info, factors = tensors.get(ROPE_FACTORS), None
    if info is not None:
        if info.kind != "F32" or len(info.shape) != 1:
            raise InputError(
                f"tensor {ROPE_FACTORS}: {info.kind} {info.shape}, F32 in a row expected"
            )
        factors = np.array(data.of(info).view("<f4"))
    config = config_of(header.keys, {n: t.shape for n, t in tensors.items()}, factors)
    if config.layers * _FEWEST > len(tensors):
        raise InputError(f"{config.layers} layers promised, {len(tensors)} tensors in the file")
    for name, size in SIZES.items():
        if dataclasses.replace(config, name=name) == size:
            return size
    return config


def _left(header: Header, config: ModelConfig, wanted: Mapping[str, Tensor]) -> dict[str, str]:
    for name, tensor in wanted.items():
        if name not in header.tensors:
            close = nearest(name, header.tensors)
            raise InputError(
                f"tensor {name}: missing (nearest: {quoted(close) if close else 'none'})"
            )
        shape = header.tensors[name].shape
        if shape != tensor.shape:
            raise InputError(f"tensor {name}: shape {shape} given, {tensor.shape} expected")
    left = {}
    for name in header.tensors.keys() - wanted.keys():
        unused = _UNUSED.fullmatch(name)
        if name == ROPE_FACTORS:
            left[name] = "rotary divisors, made from the config"
        elif unused and config.layers - config.shared_kv_layers <= int(unused[1]) < config.layers:
            left[name] = "unused K/V of a KV-sharing layer"
    unknown = [name for name in header.tensors if name not in wanted and name not in left]
    if unknown:
        close = nearest(unknown[0], wanted)
        raise InputError(
            f"{len(unknown)} unknown tensors, first {quoted(unknown[0])} (nearest: {close or 'none'})"
        )
    return dict(sorted(left.items()))


def _plans(header: Header, wanted: Mapping[str, Tensor]) -> Plans:
    plans: Plans = {}
    for name, tensor in wanted.items():
        kind = header.tensors[name].kind
        if kind in _FLOATS:
            continue
        if kind not in BLOCKS_NAMED or not tensor.parameters[0].is_site:
            known = _KNOWN if tensor.parameters[0].is_site else ", ".join(_FLOATS)
            raise InputError(f"tensor {name}: type {kind} given, one of {known} expected")
        grid = BLOCKS_NAMED[kind].grid
        plans |= {parameter.path: Plan(weight=grid) for parameter in tensor.parameters}
    return plans


def _recipe(config: ModelConfig, plans: Plans, named: str) -> tuple[str | None, Plans]:
    """The recipe that makes these tensors, and its plans."""
    if not plans:
        return None, plans
    for name in sorted(RECIPE_NAMES, key=lambda name: name != named):
        if config.family not in families_of(name):
            continue
        try:
            fitted = fit(config, name)
        except InputError:
            continue  # a tile of that recipe does not divide this model
        # That activations are rounded is not to be seen in a file's weights: only its own word can say so.
        silent = not any(plan.activations for plan in fitted.plans.values())
        same = fitted.config == config and _weights(fitted.plans) == _weights(plans)
        if same and (silent or name == named):
            return name, fitted.plans
    return FROM_FILE, plans


def _weights(plans: Plans) -> dict[str, Any]:
    return {path: plan.weight for path, plan in plans.items()}


def _leaf(info: TensorInfo, tensor: Tensor, index: int, data: _Mapped) -> Leaf:
    parameter = tensor.parameters[index]
    blocks = BLOCKS_NAMED.get(info.kind)
    bits = None if blocks is None else blocks.grid.number.bits
    return Leaf(
        path=parameter.path,
        shape=parameter.shape,
        dtype=np.dtype(_FLOATS[info.kind]).name if bits is None else f"int{bits}",
        bytes=info.bytes // len(tensor.parameters),
        read=lambda: _read(info, tensor, index, data),
    )


def _read(info: TensorInfo, tensor: Tensor, index: int, data: _Mapped) -> np.ndarray | QArray:
    parameter, raw = tensor.parameters[index], data.of(info)
    try:
        if info.kind in BLOCKS_NAMED:
            blocks = BLOCKS_NAMED[info.kind]
            rows = raw.reshape(*info.shape[:-1], info.shape[-1] // blocks.elements * blocks.size)
            return one_from_blocks(rows, tensor, blocks, index)
        stored = raw.view(_FLOATS[info.kind]).reshape(info.shape)
        return np.array(tensor.moves[index].read(stored, parameter), order="C")
    finally:
        data.forget(info)
