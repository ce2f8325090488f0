"""What travels with a checkpoint of any format: its small files, and the tensors of other models in it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from gemma_qat.checkpoint.beside import CARRIED, HUB_FORMATS, Beside, Towers, native_beside
from gemma_qat.checkpoint.huggingface import TensorFiles
from gemma_qat.checkpoint.source import Leaf
from gemma_qat.convert import open_source
from gemma_qat.errors import InputError
from gemma_qat.start import resolve_checkpoint


def companions_of(path: str | Path) -> Beside:
    """Returns what travels with the checkpoint at `path`; names and headers are read, no arrays.

    Raises: FileNotFoundError; InputError for a checkpoint that is broken.
    """
    directory = resolve_checkpoint(path)
    if (directory / "manifest.json").is_file():
        return native_beside(directory)
    with open_source(directory) as source:
        towers = None
        if source.carried and source.format in HUB_FORMATS:
            left = {leaf.path: source.left[leaf.path] for leaf in source.carried}
            towers = Towers(path=str(directory.resolve()), left=left)
        return Beside(files=source.beside, made=source.made, towers=towers)


@contextlib.contextmanager
def open_towers(towers: Towers | None) -> Iterator[Sequence[Leaf]]:
    """Gives the tensors of other models, each read when it is asked for.

    Raises: InputError when they are no longer where they were.
    """
    if towers is None:
        yield ()
        return
    directory = Path(towers.path)
    try:
        files = TensorFiles(directory, single=CARRIED if (directory / CARRIED).is_file() else None)
    except FileNotFoundError:
        raise InputError(
            f"{directory}: {len(towers.left)} tensors of other models (vision, audio) were here; "
            "put it back, or export with --no-carry"
        ) from None
    with files:
        missing = sorted(towers.left.keys() - files.names.keys())
        if missing:
            raise InputError(f"{directory}: {missing[0]} was here and is not; or --no-carry")
        yield tuple(files.raw(name) for name in towers.left)
