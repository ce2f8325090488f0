"""A file that is there whole or not at all, and the small files that travel with a model."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from gemma_qat.errors import InputError

BESIDE = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "generation_config.json",
    "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
"""Small files that belong to a model and travel with it."""


def beside(directory: Path) -> tuple[Path, ...]:
    """Returns the files in a directory, or in `beside/` of a converted one, that belong to a model."""
    found: dict[str, Path] = {}
    for folder in (directory / "beside", directory):
        found |= {name: folder / name for name in BESIDE if (folder / name).is_file()}
    return tuple(found.values())


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
