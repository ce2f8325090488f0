"""What a checkpoint of our own holds, in words, and the digests of its arrays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from gemma_qat.checkpoint.beside import CARRIED, native_beside
from gemma_qat.checkpoint.native import load_parameters, load_quantized
from gemma_qat.checkpoint.store import read_manifest
from gemma_qat.convert.parts import digest


def described_native(directory: Path) -> list[str]:
    """Returns a line for each thing there is to say; reads no array.

    Raises: FileNotFoundError; InputError for a manifest or a note of towers that is broken.
    """
    manifest = read_manifest(directory)
    step = f", step {manifest.step}" if manifest.step else ""
    lines = [f"kind {manifest.kind}, recipe {manifest.recipe or 'none (float)'}{step}"]
    origin = manifest.origin
    if origin is not None:
        lines.append(f"converted from {origin.format}")
        towers = ("vision", "audio") if origin.carried else ()
        left = {name: what for name, what in origin.left.items() if what not in towers}
        lines += [f"left out: {said}" for said in _kinds(left)]
    found = native_beside(directory)
    if found.towers is not None:
        here = (directory / CARRIED).is_file()
        where = f"in {CARRIED}" if here else f"to be read at {found.towers.path}"
        lines += [f"travels with it: {said}, {where}" for said in _kinds(found.towers.left)]
    if found.files:
        lines.append(f"beside: {', '.join(path.name for path in found.files)}")
    return lines


def native_digests(directory: Path) -> tuple[str, Iterator[tuple[str, str]]]:
    """Returns (what they are of, (checkpoint path, SHA-256) pairs): the origin's, or those of the arrays as loaded.

    Those of the origin are of the arrays as they were converted, and need no reading. Loading makes floats float32; of
    codes there are two lines, as `describe.digests` has them.
    """
    manifest = read_manifest(directory)
    if manifest.origin is not None:
        what = f"as they were converted from {manifest.origin.format}"
        return what, iter(sorted(manifest.origin.digests.items()))
    return "as they are loaded", _computed(directory, manifest.kind != "float")


def _computed(directory: Path, has_codes: bool) -> Iterator[tuple[str, str]]:
    for path, leaf in load_parameters(directory)[1].items():
        yield path, digest(np.asarray(leaf))
    if has_codes:
        for path, q in load_quantized(directory)[1].items():
            yield f"{path}/codes", digest(np.asarray(q.codes))
            yield f"{path}/scale", digest(np.asarray(q.scale))


def _kinds(tensors: Mapping[str, str]) -> Iterator[str]:
    for what, number in sorted(Counter(tensors.values()).items()):
        first = min(name for name, kind in tensors.items() if kind == what)
        yield f"{number} tensors ({what}), first {first}"
