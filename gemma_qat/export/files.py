"""A file that is there whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from gemma_qat.errors import InputError


@contextlib.contextmanager
def appearing_file(out: Path) -> Iterator[Path]:
    """Gives a name in the same directory that becomes `out` when the block ends well.

    What stood at `out` stays until then, and stays for good when the block fails; the partial file
    is removed.

    Raises: InputError when `out` is a directory.
    """
    if out.is_dir():
        raise InputError(f"{out}: a directory given, the name of a file expected")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)
