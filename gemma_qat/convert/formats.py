"""Every foreign format that is read: how it is recognised by its contents, and what opens it.

A row recognises without reading arrays; the first that does opens. Pickles are never read: unpickling runs code.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

from gemma_qat.checkpoint.deepmind import looks_like_deepmind, open_deepmind
from gemma_qat.checkpoint.hf_config import quantization_method
from gemma_qat.checkpoint.huggingface import INDEX, SINGLE, open_huggingface
from gemma_qat.checkpoint.source import Source
from gemma_qat.errors import InputError, refuse_address
from gemma_qat.export import (
    looks_like_gguf,
    looks_like_litert,
    open_compressed_tensors,
    open_gguf,
    open_litert,
    open_mobile,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """A row: a kind of checkpoint that is read."""

    name: str
    summary: str
    """What a person looks for."""
    looks: Callable[[Path], bool]
    """Whether a path holds one, by names and headers; raises InputError for one that is broken."""
    open: Callable[[Path], contextlib.AbstractContextManager[Source]]


def is_huggingface(path: Path, method: str | None) -> bool:
    """Returns whether a path is a Hugging Face directory with this `quant_method` (None: floats)."""
    if not (path / "config.json").is_file():
        return False
    if not any((path / name).is_file() for name in (SINGLE, INDEX)):
        return False
    return quantization_method(path) == method


FORMATS: tuple[Format, ...] = (
    Format(
        name="safetensors",
        summary="Hugging Face directory: config.json and model.safetensors, or an index and shards",
        looks=lambda path: is_huggingface(path, None),
        open=open_huggingface,
    ),
    Format(
        name="gemma",
        summary="Hugging Face directory of the mobile schema (quant_method gemma)",
        looks=lambda path: is_huggingface(path, "gemma"),
        open=open_mobile,
    ),
    Format(
        name="compressed-tensors",
        summary="Hugging Face directory of compressed-tensors",
        looks=lambda path: is_huggingface(path, "compressed-tensors"),
        open=open_compressed_tensors,
    ),
    Format(
        name="orbax",
        summary="DeepMind's Orbax tree, alone or in a Kaggle directory beside its tokenizer",
        looks=looks_like_deepmind,
        open=open_deepmind,
    ),
    Format(
        name="gguf",
        summary="GGUF file of architecture gemma4",
        looks=looks_like_gguf,
        open=open_gguf,
    ),
    Format(
        name="litert",
        summary="LiteRT model (.tflite) or bundle (.litertlm) that this project wrote",
        looks=looks_like_litert,
        open=open_litert,
    ),
)

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def format_of(path: Path) -> Format:
    """Returns the first format that recognises what is at `path`.

    Raises: FileNotFoundError; InputError for pickles, and for what no format recognises, saying which there are.
    """
    refuse_address(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    found = next((row for row in FORMATS if row.looks(path)), None)
    if found is not None:
        return found
    if (path / "manifest.json").is_file():
        raise InputError(f"{path}: a checkpoint of this project already, nothing to convert")
    _refuse_pickles(path)
    if (path / "config.json").is_file():
        method = quantization_method(path)
        if method is not None:
            raise InputError(f"{path}: quant_method {method} is not one that is read")
        raise FileNotFoundError(f"{path}: no {SINGLE} and no {INDEX} beside config.json")
    known = "; ".join(row.summary for row in FORMATS)
    raise InputError(f"{path}: no checkpoint that is known; expected one of: {known}")


def _refuse_pickles(path: Path) -> None:
    files = [path] if path.is_file() else sorted(path.iterdir())
    for file in files:
        if file.suffix in _PICKLES and file.is_file():
            raise InputError(
                f"{file}: pickle files are never read, since unpickling runs code; give safetensors"
            )


@contextlib.contextmanager
def open_source(path: Path) -> Iterator[Source]:
    """Gives the checkpoint at `path`, whatever its format; names and headers are read, arrays when they are asked for.

    Raises: FileNotFoundError; InputError as `format_of` and the format's own reader do.
    """
    with format_of(path).open(path) as source:
        yield source
