"""The parts a conversion is written in: which arrays stand in each, and what is stored of them."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable

import numpy as np

from gemma_qat.checkpoint.packing import packed_by_rows
from gemma_qat.checkpoint.source import Leaf, Source
from gemma_qat.errors import InputError
from gemma_qat.models import Fitted, abstract_parameters, float_parameters
from gemma_qat.numerics import QArray

_PART = 256 * 2**20
"""Bytes of a part. Smaller ones cost files and calls, larger ones memory, and work that is lost when killed."""

_PIECE = 2**18
"""Elements that are looked at together for numbers that are not finite."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """Arrays that are written together."""

    name: str
    """Directory, such as parameters/00003."""
    leaves: tuple[Leaf, ...]

    @property
    def bytes(self) -> int:
        """What reading it reads."""
        return sum(leaf.bytes for leaf in self.leaves)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Read:
    """A part in memory, by path."""

    arrays: dict[str, np.ndarray]
    """What is stored."""
    digests: dict[str, str]
    """Of what was read."""
    not_finite: list[str]
    """Arrays with inf or nan among their floats or scales."""


def parts_of(source: Source) -> list[Part]:
    """Returns the parts of a source, in the order in which it is read; the same source gives the same parts.

    Raises: InputError when the source is not what its config and plans say, naming the first difference.
    """
    _check(source)
    parts: list[Part] = []
    for name, planned in (("parameters", False), ("quantized", True)):
        rest = [leaf for leaf in source.leaves if (leaf.path in source.plans) == planned]
        for number, leaves in enumerate(_cut(rest)):
            parts.append(Part(name=f"{name}/{number:05}", leaves=leaves))
    return parts


def _cut(leaves: list[Leaf]) -> list[tuple[Leaf, ...]]:
    groups: list[tuple[Leaf, ...]] = []
    for leaf in leaves:
        if groups and sum(other.bytes for other in groups[-1]) + leaf.bytes <= _PART:
            groups[-1] = (*groups[-1], leaf)
        else:
            groups.append((leaf,))
    return groups


def _check(source: Source) -> None:
    shapes = abstract_parameters(source.config, source.plans)
    wanted = shapes
    if source.plans:
        if source.recipe is None:
            raise InputError(f"{source.config.name}: codes without the name of a recipe")
        fitted = Fitted(config=source.config, recipe=source.recipe, plans=source.plans)
        wanted = float_parameters(shapes, fitted) | {path: shapes[path] for path in source.plans}
    found = {leaf.path: leaf for leaf in source.leaves}
    for path in sorted(wanted.keys() ^ found.keys()):
        what = "missing" if path in wanted else "not one of the model's arrays"
        raise InputError(f"{source.config.name}: {path} is {what}")
    for path, leaf in found.items():
        if tuple(leaf.shape) != tuple(wanted[path].shape):
            raise InputError(
                f"{source.config.name}: {path} has shape {leaf.shape}, {wanted[path].shape} expected"
            )


def read_part(part: Part, source: Source, report: Callable[[int], None]) -> Read:
    """Returns what a part holds; `report` is told of the bytes so far.

    Exactness: floats and codes bit for bit as the source gives them; packing moves bits only.
    """
    read = Read(arrays={}, digests={}, not_finite=[])
    done = 0
    for leaf in part.leaves:
        value = leaf.read()
        if isinstance(value, QArray) != (leaf.path in source.plans):
            raise InputError(
                f"{leaf.path}: codes for sites with a plan and floats for others expected"
            )
        if isinstance(value, QArray):
            codes, floats = np.asarray(value.codes), np.asarray(value.scale)
            read.digests.update(
                {f"{leaf.path}/codes": digest(codes), f"{leaf.path}/scale": digest(floats)}
            )
            read.arrays.update(
                {f"{leaf.path}/{n}": array for n, array in packed_by_rows(value).items()}
            )
        else:
            floats = value
            read.digests[leaf.path] = digest(value)
            read.arrays[leaf.path] = value
        if not _finite(floats):
            read.not_finite.append(leaf.path)
        done += leaf.bytes
        report(done)
    return read


def _finite(array: np.ndarray) -> bool:
    """Whether no element is inf or nan: none has all bits of the exponent set, which are the bits of inf.

    In pieces, for the bits of all elements are memory too; `isfinite` is several times slower for bfloat16.
    """
    kind = f"u{array.dtype.itemsize}"
    exponent = np.array(np.inf, array.dtype).view(kind)
    flat = np.ascontiguousarray(array).reshape(-1).view(kind)
    pieces = (flat[start : start + _PIECE] for start in range(0, flat.size, _PIECE))
    return all(bool((piece & exponent).max() != exponent) for piece in pieces)


def digest(array: np.ndarray) -> str:
    """Returns the SHA-256 of an array's bytes in C order."""
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return hashlib.sha256(data.data).hexdigest()
