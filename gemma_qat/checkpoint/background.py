"""Checkpoints that are written while training goes on: Orbax's `AsyncCheckpointer` around our directory layout.

A save has two halves. The blocking one computes each part on the devices and copies every process's own shards to its
host; after it, the training state may change. The other half runs in a thread: the shards are written, and when every
process has written its own, process 0 merges them and renames the directory to its name. So a directory that has its
name is complete, whatever happened to the processes, and one that has not is left over and may be deleted.

Orbax brings the thread, the temporary directory, the rename and the barriers between processes. Its `CheckpointManager`
is not used: it would fix the layout (no plain `manifest.json` and `data.json` in a step's directory), which other
programs read. Parts are computed one after the other, so the devices hold copies of one part at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from gemma_qat.checkpoint.store import reason, write_json
from gemma_qat.errors import InputError
from gemma_qat.nn.module import nest

Part = Callable[[], Mapping[str, Any]]
"""Computes the arrays of a part by path, in buffers of their own: those of the state are donated to the next step."""


class _Handler(ocp.AsyncCheckpointHandler):
    """Writes arrays as one Orbax directory a part, and small files beside them."""

    def __init__(self) -> None:
        self._arrays = ocp.StandardCheckpointHandler()

    async def async_save(self, directory: Any, args: _Contents) -> Any:
        pending: list[Any] = []
        for name, compute in args.parts.items():
            part = directory / name
            part.mkdir(exist_ok=True)  # By whichever process comes first.
            tree = nest(compute())
            pending += await self._arrays.async_save(part, args=ocp.args.StandardSave(tree)) or []
        if jax.process_index() == 0:
            for name, value in args.files.items():
                write_json(Path(directory / name), value)
        return pending

    def finalize(self, directory: Any) -> None:
        for part in directory.iterdir():
            if part.is_dir():
                self._arrays.finalize(part)

    def save(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("saves are asynchronous")

    def restore(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("read each part with restore_arrays")

    def close(self) -> None:
        self._arrays.close()


@ocp.args.register_with_handler(_Handler, for_save=True, for_restore=True)
@dataclasses.dataclass
class _Contents(ocp.args.CheckpointArgs):
    """What one save holds."""

    parts: Mapping[str, Part]
    files: Mapping[str, Any]


class Writer:
    """Writes one checkpoint at a time in the background; every process calls every method in the same order."""

    def __init__(self) -> None:
        options = ocp.AsyncOptions(create_directories_asynchronously=False)
        self._checkpointer = ocp.AsyncCheckpointer(_Handler(), async_options=options)
        self._directory: Path | None = None

    def save(self, directory: Path, parts: Mapping[str, Part], files: Mapping[str, Any]) -> None:
        """Begins to write `directory` after the save before it has ended; returns when no device array is needed.

        `files` are JSON values by file name.
        Raises: InputError when this save cannot begin or the one before it failed; ValueError if `directory` exists.
        """
        self.wait()
        self._directory = directory
        try:
            self._checkpointer.save(directory.absolute(), args=_Contents(parts, files))
        except OSError as error:
            raise self._failed(error) from error

    def check(self) -> None:
        """Raises InputError when the last save has failed, if that is known by now; costs nothing."""
        try:
            self._checkpointer.check_for_errors()
        except Exception as error:
            raise self._failed(error) from error

    def wait(self) -> None:
        """Returns when the last save is complete.

        Raises: InputError when it failed.
        """
        try:
            self._checkpointer.wait_until_finished()
        except Exception as error:
            raise self._failed(error) from error

    def close(self) -> None:
        """Waits and lets the thread go.

        Raises: InputError when the last save failed.
        """
        try:
            self._checkpointer.close()
        except Exception as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> InputError:
        return InputError(f"{self._directory}: cannot be saved ({reason(error)})")
