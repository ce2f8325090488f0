"""In which number types the floats of one of our checkpoints are stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from gemma_qat.checkpoint.store import parts_of, reason
from gemma_qat.errors import InputError


def stored_dtypes(directory: Path) -> dict[str, str]:
    """Returns the number type of every array of `directory/parameters` by path, such as bfloat16; reads no array.

    Raises: InputError naming the part whose list of arrays cannot be read.
    """
    import orbax.checkpoint as ocp

    found: dict[str, str] = {}
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            for part in parts_of(directory / "parameters"):
                _add(checkpointer.metadata(part.absolute()).item_metadata.tree, "", found)
    except Exception as error:  # Orbax raises bare exceptions
        raise InputError(f"{directory}: cannot be restored ({reason(error)})") from None
    return found


def _add(tree: Any, start: str, found: dict[str, str]) -> None:
    for name, below in tree.items():
        if isinstance(below, dict):
            _add(below, f"{start}{name}/", found)
        else:
            found[f"{start}{name}"] = np.dtype(below.dtype).name
