"""What a foreign checkpoint holds, in words: its format, size, number types, and what is not the decoder's."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator

import numpy as np

from gemma_qat.checkpoint.source import Source
from gemma_qat.convert.parts import digest
from gemma_qat.models import SIZES, ModelConfig
from gemma_qat.numerics import QArray


def described(source: Source) -> list[str]:
    """Returns a line for each thing there is to say; reads no array."""
    bytes_of: Counter[str] = Counter()
    count: Counter[str] = Counter()
    for leaf in source.leaves:
        bytes_of[leaf.dtype] += leaf.bytes
        count[leaf.dtype] += 1
    kinds = ", ".join(
        f"{count[name]} {name} ({size / 1e9:.3f} GB)" for name, size in bytes_of.most_common()
    )
    lines = [
        f"format {source.format}; size {size_of(source.config) or 'none of those released'}; "
        f"{'floats' if source.recipe is None else f'codes of {source.recipe}'}",
        f"arrays: {kinds}",
    ]
    for what, number in sorted(Counter(source.left.values()).items()):
        lines.append(f"not the decoder's: {number} tensors ({what}), first {_first(source, what)}")
    beside = [*(path.name for path in source.beside), *source.made]
    if beside:
        lines.append(f"beside: {', '.join(beside)}")
    return lines


def size_of(config: ModelConfig) -> str | None:
    """Returns the name of the size a config is, whatever it calls itself."""
    same = (name for name, size in SIZES.items() if dataclasses.replace(config, name=name) == size)
    return next(same, None)


def digests(source: Source) -> Iterator[tuple[str, str]]:
    """Yields (checkpoint path, SHA-256 of the array as it is stored), array by array; of codes two lines."""
    for leaf in source.leaves:
        value = leaf.read()
        if isinstance(value, QArray):
            yield f"{leaf.path}/codes", digest(np.asarray(value.codes))
            yield f"{leaf.path}/scale", digest(np.asarray(value.scale))
        else:
            yield leaf.path, digest(value)


def _first(source: Source, what: str) -> str:
    return min(name for name, kind in source.left.items() if kind == what)
