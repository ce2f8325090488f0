"""Checkpoints on disk: Orbax arrays with a manifest that says what they are.

    <directory>/
      manifest.json   kind (float | qat | packed), model config, recipe, plans; written last inside a temporary
      directory
      parameters/     masters (or what stays in float), one array a layer
      quantized/      qat and packed: words and scales of every planned site, by the training quantizer
                      either is an Orbax checkpoint, or several numbered ones (a conversion writes them one by one)
      optimizer/      training only
      data.json       training only: the data iterator's state and the curves

A directory appears by rename when it is complete; an unfinished one is never seen under its name. `background.py`
writes the same while training goes on.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gemma_qat.checkpoint.manifest import Manifest
from gemma_qat.errors import InputError
from gemma_qat.nn.module import nest


@contextlib.contextmanager
def appearing(directory: Path, marker: str = "manifest.json") -> Iterator[Path]:
    """Gives a temporary directory that becomes `directory` when the block ends well; a checkpoint there is replaced.

    `marker` is the file that a directory must hold to be replaced.
    Raises: InputError when what is there is no checkpoint of this project.
    """
    refuse_to_replace(directory, marker)
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    temporary.rmdir()  # that one is private to its owner
    temporary.mkdir(0o755)
    try:
        yield temporary
        appear(temporary, directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def appear(temporary: Path, directory: Path) -> None:
    """Renames a complete `temporary` beside `directory` to it; a checkpoint there is replaced."""
    if directory.exists():
        doomed = Path(tempfile.mkdtemp(prefix=f".{directory.name}.old.", dir=directory.parent))
        os.replace(directory, doomed / "old")
        os.replace(temporary, directory)
        shutil.rmtree(doomed)
    else:
        os.replace(temporary, directory)


def refuse_to_replace(directory: Path, marker: str = "manifest.json") -> None:
    """Raises InputError when a checkpoint at `directory` would take the place of anything but a checkpoint."""
    if directory.is_dir() and not any(directory.iterdir()):
        return
    if directory.exists() and not (directory / marker).is_file():
        what = f"a directory without a {marker}" if directory.is_dir() else "a file"
        raise InputError(
            f"{directory}: there is {what}, which is not replaced; give a new name or another checkpoint's"
        )


UNFINISHED = ("*.orbax-checkpoint-tmp*", ".[0-9]*")
"""Names of what an interrupted save or deletion leaves behind among the saves of a run."""


def sweep(directory: Path) -> list[str]:
    """Deletes what interrupted saves and deletions left among the saves of a run; returns the names."""
    found = [path for pattern in UNFINISHED for path in directory.glob(pattern) if path.is_dir()]
    for path in found:
        shutil.rmtree(path)
    return sorted(path.name for path in found)


def discard(directory: Path) -> None:
    """Deletes a save; one that is half deleted is never seen under its name."""
    doomed = directory.with_name(f".{directory.name}.old")
    os.replace(directory, doomed)
    shutil.rmtree(doomed)


def save_arrays(directory: Path, flat: Mapping[str, Any]) -> None:
    """Writes arrays by path with Orbax, each as its own entry."""
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory.absolute(), nest(flat))


_CHUNK = 32 * 2**20
"""Bytes of an array that are buffered and written at a time, and that a reader of a shard reads at least."""


def save_part(directory: Path, flat: Mapping[str, np.ndarray]) -> None:
    """Writes one part of a large checkpoint: host arrays by path, in chunks and without a copy of any.

    The directory appears when it is complete; Orbax writes it under another name before.
    Raises: InputError naming the directory when it cannot be written.
    """
    import orbax.checkpoint as ocp

    # The handler's own default copies every array, so that a caller may go on and change it.
    in_place = ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)
    registry = ocp.type_handlers.create_type_handler_registry(
        (np.ndarray, in_place), (jax.Array, ocp.type_handlers.ArrayHandler())
    )
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_compression=False)
    chunks = {path: ocp.SaveArgs(chunk_byte_size=_CHUNK) for path in flat}
    try:
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(
                directory.absolute(),
                args=ocp.args.PyTreeSave(
                    nest(flat), save_args=nest(chunks), ocdbt_target_data_file_size=_CHUNK
                ),
            )
    except Exception as error:  # Orbax raises bare exceptions, of a full disk too
        raise InputError(f"{directory}: cannot be written ({reason(error)})") from None


def restore_arrays(directory: Path, abstract: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arrays of `directory`, placed as the abstract ones say.

    An abstract array with a sharding is read onto it, whatever the mesh and the number of processes it was saved from:
    each process reads the bytes of its own shards. One without is read onto this process's first device.
    Raises: InputError naming the directory when an entry is missing, misshaped or unreadable.
    """
    import orbax.checkpoint as ocp

    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: no such checkpoint part")
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            parts = _parts(checkpointer, directory, abstract)
            out: dict[str, Any] = {}
            for part, paths in parts.items():
                wanted = {path: _placed(abstract[path]) for path in paths}
                tree = checkpointer.restore(part.absolute(), nest(wanted))
                out |= {path: _at(tree, path) for path in paths}
    except InputError:
        raise
    except Exception as error:  # Orbax raises bare exceptions for arrays it cannot read
        raise InputError(f"{directory}: cannot be restored ({reason(error)})") from None
    return {path: out[path] for path in abstract}


def parts_of(directory: Path) -> list[Path]:
    """Returns the Orbax checkpoints that hold the arrays of `directory`: itself, or the numbered ones in it."""
    return sorted(path for path in directory.iterdir() if path.name.isdigit()) or [directory]


def _parts(
    checkpointer: Any, directory: Path, abstract: Mapping[str, Any]
) -> dict[Path, list[str]]:
    """Returns which arrays are in which part, all of them found and in the right shape before anything is read."""
    found: dict[Path, list[str]] = {}
    missing = dict.fromkeys(abstract)
    for part in parts_of(directory):
        stored = checkpointer.metadata(part.absolute()).item_metadata
        if stored is None:  # Orbax logs why, and goes on.
            raise InputError(f"{part}: cannot be restored (its list of arrays is damaged)")
        found[part] = _check_stored(part, stored.tree, abstract)
        for path in found[part]:
            missing.pop(path, None)
    for path in missing:
        raise InputError(f"{directory}: cannot be restored ({path} is missing)")
    return {part: paths for part, paths in found.items() if paths}


def _placed(leaf: Any) -> jax.ShapeDtypeStruct:
    # Orbax would otherwise want the devices that the array was saved from.
    where = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)


def _check_stored(directory: Path, stored: Any, abstract: Mapping[str, Any]) -> list[str]:
    """Returns the paths that are there; raises InputError at the first of another shape, before anything is read."""
    paths = []
    for path, leaf in abstract.items():
        try:
            found = tuple(_at(stored, path).shape)
        except (KeyError, TypeError, AttributeError):
            continue
        if found != tuple(leaf.shape):
            raise InputError(
                f"{directory}: cannot be restored ({path} has the shape {found}, expected {tuple(leaf.shape)})"
            )
        paths.append(path)
    return paths


def reason(error: BaseException) -> str:
    """Returns the first line of what first went wrong, of an error that Orbax has wrapped."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _at(tree: Any, path: str) -> Any:
    for name in path.split("/"):
        tree = tree[name]
    return tree


def write_json(path: Path, value: Any) -> None:
    """Writes JSON, sorted and with a final newline."""
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", "utf-8")


def read_manifest(directory: Path) -> Manifest:
    """Returns the manifest of a checkpoint directory.

    Raises: FileNotFoundError; InputError naming the file when it is not one of ours.
    """
    path = directory / "manifest.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{directory}: no manifest.json, so not a checkpoint of this project"
        )
    try:
        raw = json.loads(path.read_text("utf-8"))
        if not isinstance(raw, dict):
            raise TypeError(f"a JSON object expected, {type(raw).__name__} given")
        return Manifest.from_json(raw)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a checkpoint manifest ({error})") from None


def packed_arrays(quantized: Mapping[str, Any]) -> dict[str, Any]:
    """Returns words and scales of packed arrays by path, ready to be saved."""
    out = {}
    for path, packed in quantized.items():
        out[f"{path}/words"], out[f"{path}/scale"] = packed.words, packed.scale
    return out


def host(tree: Any) -> Any:
    """Returns the tree as numpy arrays on this host."""
    return jax.tree.map(np.asarray, tree)
