"""A foreign checkpoint becomes one of ours, part by part.

    .NAME.converting/          beside NAME until it is complete, then it is NAME
      parameters/00000/ ...    parts: Orbax checkpoints of up to 256 MiB, or of one larger array
      quantized/00000/ ...     words and scales, of a quantized source
      conversion/              what is converted, and of each part the digests and which arrays are not finite: a
                               conversion that was killed goes on after the parts that are there
      carried.safetensors      tensors of other models (vision, audio), if asked for
      beside/                  tokenizer, chat template, generation config, the source's config.json
      manifest.json            written last

One part is in memory at a time: the larger of 256 MiB and the largest array, what the array was cut from, and about
0.15 GB of buffers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from gemma_qat.checkpoint.appear import appear, refuse_to_replace
from gemma_qat.checkpoint.beside import CARRIED, HUB_FORMATS, Beside
from gemma_qat.checkpoint.manifest import Manifest, Origin
from gemma_qat.checkpoint.safetensors_file import of_leaf, write_file
from gemma_qat.checkpoint.source import Source
from gemma_qat.checkpoint.store import (
    read_manifest,
    save_part,
    sweep,
    write_json,
)
from gemma_qat.convert.formats import open_source
from gemma_qat.convert.parts import Part, parts_of, read_part
from gemma_qat.errors import InputError

Report = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Converted:
    """What a conversion wrote."""

    manifest: Manifest
    origin: Origin
    bytes: int
    """Of arrays, as they stand in the source."""
    resumed: int
    """Of these, what an earlier conversion had written before it was stopped."""
    not_finite: tuple[str, ...] = ()
    """Paths of arrays that hold inf or nan: their bits are kept, but no recipe quantizes them."""


def convert(
    path: Path,
    out: Path,
    *,
    carry: bool | None = None,
    change: Callable[[Source], Source] = lambda source: source,
    report: Report = lambda description, done, total: None,
) -> Converted:
    """Writes the checkpoint at `path` as a native one at `out`: floats in their own dtype, codes as they are.

    It appears when it is complete; one that stood there is replaced then. Started again after it was killed it goes on
    after the last part that was finished; one that fails before any is leaves nothing. `carry` takes along the tensors
    of other models, by default those that came from the hub and can go back there; `change` is applied to the source
    first. `report` is told of bytes.
    Raises: FileNotFoundError; InputError for a source that is broken or not known, a disk that is too small, another
        conversion to the same place, or something at `out` that is no checkpoint.
    """
    refuse_to_replace(out)
    with open_source(path) as opened:
        source = change(opened)
        carry = source.format in HUB_FORMATS if carry is None else carry
        parts = parts_of(source)
        stamp = {"version": 2, "files": _files(path), "source": _identity(source), "carry": carry}
        with _working(out, stamp) as working:
            done = [part for part in parts if (working / part.name).is_dir()]
            resumed = sum(part.bytes for part in done)
            if not (working / "manifest.json").is_file():
                _check_space(working, source, parts, resumed, carry)
                _write_parts(working, parts, source, report)
                _write_rest(working, parts, source, carry)
            manifest = read_manifest(working)
            not_finite = [path for part in parts for path in _noted(working, part)["not_finite"]]
            appear(working, out)
            shutil.rmtree(out / "conversion")
    assert manifest.origin is not None  # written above
    return Converted(
        manifest=manifest, origin=manifest.origin, bytes=sum(part.bytes for part in parts),
        resumed=resumed, not_finite=tuple(not_finite),
    )  # fmt: skip


@contextlib.contextmanager
def _working(out: Path, stamp: dict[str, Any]) -> Iterator[Path]:
    """Gives the directory to write in: what a conversion of the same thing left, or an empty one.

    It is locked while this process lives; what another conversion of something else left in it goes.
    """
    working = out.with_name(f".{out.name}.converting")
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = out.with_name(f".{out.name}.lock")
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if lock.stat().st_ino != os.fstat(file.fileno()).st_ino:
                raise BlockingIOError  # its holder removed it, and the next one has made another
        except OSError:
            raise InputError(f"{out}: another conversion is writing it") from None
        try:
            said = working / "conversion" / "stamp.json"
            if not said.is_file() or json.loads(said.read_text("utf-8")) != stamp:
                shutil.rmtree(working, ignore_errors=True)
                said.parent.mkdir(parents=True)
                _write_whole(said, stamp)
            for name in ("parameters", "quantized"):
                sweep(working / name)
            yield working
        finally:
            if not any(part.name.isdigit() for part in working.glob("*/*")):
                shutil.rmtree(working, ignore_errors=True)  # nothing to go on from
            lock.unlink(missing_ok=True)


def _write_whole(path: Path, value: Any) -> None:
    """Writes JSON that is there whole or not at all."""
    unfinished = path.with_name(f"{path.name}.partial")
    write_json(unfinished, value)
    os.replace(unfinished, path)


def _files(path: Path) -> dict[str, list[int]]:
    """Size and time of every file of the source: what must be the same for a conversion to go on."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    found = {str(file.relative_to(path)): file.stat() for file in files}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in found.items()}


def _identity(source: Source) -> str:
    leaves = [(leaf.path, list(leaf.shape), leaf.dtype, leaf.bytes) for leaf in source.leaves]
    what = (source.format, str(source.config), source.recipe, sorted(source.plans), leaves)
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def _check_space(
    working: Path, source: Source, parts: list[Part], resumed: int, carry: bool
) -> None:
    needed = sum(part.bytes for part in parts) - resumed
    needed += sum(leaf.bytes for leaf in source.carried if carry)
    needed += sum(path.stat().st_size for path in source.beside)
    needed += needed // 100 + 2**20  # names, shapes and the edges of blocks
    free = shutil.disk_usage(working).free
    if free < needed:
        raise InputError(
            f"{working.parent}: {free / 1e9:.2f} GB free, {needed / 1e9:.2f} GB needed for the conversion"
        )


def _write_parts(working: Path, parts: list[Part], source: Source, report: Report) -> None:
    total = sum(part.bytes for part in parts)
    todo = [part for part in parts if not (working / part.name).is_dir()]
    done = total - sum(part.bytes for part in todo)
    report("converted", done, total)
    for part in todo:
        read = read_part(part, source, partial(_add, report, done, total))
        _write_whole(
            _note_of(working, part), {"digests": read.digests, "not_finite": read.not_finite}
        )
        save_part(working / part.name, read.arrays)
        done += part.bytes


def _add(report: Report, before: int, total: int, read: int) -> None:
    report("converted", before + read, total)


def _note_of(working: Path, part: Part) -> Path:
    return working / "conversion" / f"{part.name.replace('/', '-')}.json"


def _noted(working: Path, part: Part) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(_note_of(working, part).read_text("utf-8"))
    return found


def _write_rest(working: Path, parts: list[Part], source: Source, carry: bool) -> None:
    if carry and source.carried:
        write_file(working / CARRIED, [of_leaf(leaf) for leaf in source.carried])
    Beside(files=source.beside, made=source.made).keep(working)
    digests: dict[str, str] = {}
    for part in parts:
        digests |= _noted(working, part)["digests"]
    manifest = Manifest(
        kind="packed" if source.plans else "float", config=source.config, recipe=source.recipe,
        plans=source.plans, imported=bool(source.plans),
        origin=Origin(
            format=source.format, digests=digests, left=dict(source.left),
            carried=carry and bool(source.carried),
        ),
    )  # fmt: skip
    _write_whole(working / "manifest.json", manifest.to_json())
