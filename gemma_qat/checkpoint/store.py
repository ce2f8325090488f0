"""Checkpoints on disk: Orbax arrays with a manifest that says what they are.

    <directory>/
      manifest.json   kind (float | qat | packed), model config, recipe, plans; written last inside a temporary
      directory
      parameters/     masters (or what stays in float), one array a layer
      quantized/      qat and packed: words and scales of every planned site, by the training quantizer
                      either is an Orbax checkpoint, or several numbered ones (a conversion writes them one by one)
      optimizer/      training only
      data.json       training only: the data iterator's state and the curves

A directory appears by rename when it is complete (`appear.py`); an unfinished one is never seen under its name.
`background.py` writes the same while training goes on.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_qat.checkpoint.manifest import Manifest
from gemma_qat.errors import InputError
from gemma_qat.nn.module import nest

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
    """Writes arrays by path with Orbax, each as its own entry.

    Raises: InputError naming the directory when it cannot be written.
    """
    import orbax.checkpoint as ocp

    try:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(directory.absolute(), nest(flat))
    except Exception as error:  # Orbax raises bare exceptions, of a full disk too
        raise InputError(f"{directory}: cannot be written ({reason(error)})") from None


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
    """Returns `read_arrays`, all of them on devices."""
    found = read_arrays(directory, abstract)
    return {path: on_device([found.pop(path)]) for path in abstract}


def on_device(arrays: Sequence[Any], stack: bool = False) -> jax.Array:
    """Returns an array of `read_arrays` on this process's first device, or several stacked along a new axis.

    In memory that XLA takes as it is on CPU, where it would otherwise copy once more.
    """
    first = arrays[0]
    if isinstance(first, jax.Array):
        return jnp.stack(arrays) if stack else first
    raw = np.empty(len(arrays) * first.nbytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    whole = raw[start : start + len(arrays) * first.nbytes].view(first.dtype)
    whole = whole.reshape(len(arrays), *first.shape)
    for place, array in enumerate(arrays):
        whole[place] = array
    return jax.device_put(whole if stack else whole[0, ...])  # of scalars an array, too


_ALIGNMENT = 64
"""Bytes, of arrays that XLA does not copy on CPU."""


def read_arrays(directory: Path, abstract: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arrays of `directory`, placed as the abstract ones say.

    An abstract array with a sharding is read onto it, whatever the mesh and the number of processes it was saved from:
    each process reads the bytes of its own shards. One without is read as a numpy array.
    Raises: InputError naming the directory when an entry is missing, misshaped or unreadable.
    """
    import orbax.checkpoint as ocp

    parts = check_arrays(directory, abstract)
    try:
        out: dict[str, Any] = {}
        with ocp.PyTreeCheckpointer() as checkpointer:
            for part, paths in parts.items():
                for names in together({path: nbytes(abstract[path]) for path in paths}):
                    some = {path: abstract[path] for path in names}
                    tree = checkpointer.restore(
                        part.absolute(),
                        args=ocp.args.PyTreeRestore(
                            item=nest(some), partial_restore=True,
                            restore_args=nest({path: _how(leaf) for path, leaf in some.items()}),
                        ),
                    )  # fmt: skip
                    out |= {path: _at(tree, path) for path in some}
    except InputError:
        raise
    except Exception as error:  # Orbax raises bare exceptions for arrays it cannot read
        raise InputError(f"{directory}: cannot be restored ({reason(error)})") from None
    return {path: out[path] for path in abstract}


def check_arrays(directory: Path, abstract: Mapping[str, Any]) -> dict[Path, list[str]]:
    """Returns which arrays of `directory` are in which Orbax checkpoint; lists and shapes are read, no array.

    Raises: FileNotFoundError; InputError naming the directory when one is missing or of another shape.
    """
    import orbax.checkpoint as ocp

    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: no such checkpoint part")
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return _parts(checkpointer, directory, abstract)
    except InputError:
        raise
    except Exception as error:  # Orbax raises bare exceptions for lists it cannot read
        raise InputError(f"{directory}: cannot be restored ({reason(error)})") from None


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


_TOGETHER = 2**28
"""Bytes that are read at a time, about: what reading takes beside the arrays themselves grows with it."""


def together(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Yields names of what is to be read at a time, in the order of `sizes`, which are bytes."""
    some: list[str] = []
    total = 0
    for name, size in sizes.items():
        if some and total + size > _TOGETHER:
            yield some
            some, total = [], 0
        some.append(name)
        total += size
    if some:
        yield some


def nbytes(leaf: Any) -> int:
    """Returns the bytes of an array, or of an abstract one."""
    return math.prod(leaf.shape) * leaf.dtype.itemsize


def _how(leaf: Any) -> Any:
    import orbax.checkpoint as ocp

    # Orbax would otherwise want the devices that the array was saved from.
    if leaf.sharding is None:
        return ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)
    return ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype)


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
        refuse_large_chunks(_at(stored, path), f"{directory}: {path}")
        paths.append(path)
    return paths


def refuse_large_chunks(stored: Any, where: str) -> None:
    """Raises InputError when Orbax's metadata of an array says that it lies in chunks larger than itself.

    A chunk is decoded whole: TensorStore 0.1.86 takes the memory for it whatever the size, or ends the process.
    """
    storage = getattr(stored, "storage", None)
    shape = [max(1, size) for size in stored.shape]
    for chunk in (storage.chunk_shape, storage.write_shape) if storage is not None else ():
        if chunk is not None and any(c > s for c, s in zip(chunk, shape, strict=True)):
            raise InputError(f"{where} of shape {tuple(stored.shape)} lies in chunks of {chunk}")


def reason(error: BaseException) -> str:
    """Returns the first line of what first went wrong, of an error that Orbax has wrapped."""
    while error.__cause__ is not None:
        error = error.__cause__
    said = f"{error} is missing" if isinstance(error, KeyError) else str(error)
    return (said.strip().splitlines() or [type(error).__name__])[0]


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
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: not a checkpoint manifest ({reason(error)})") from None


def packed_arrays(quantized: Mapping[str, Any]) -> dict[str, Any]:
    """Returns words and scales of packed arrays by path, ready to be saved."""
    out = {}
    for path, packed in quantized.items():
        out[f"{path}/words"], out[f"{path}/scale"] = packed.words, packed.scale
    return out


def host(tree: Any) -> Any:
    """Returns the tree as numpy arrays on this host."""
    return jax.tree.map(np.asarray, tree)
