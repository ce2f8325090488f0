"""Reading DeepMind's Orbax trees of Gemma 4 text decoders, array by array.

Which size it is follows from names and shapes, which are all there is: these trees come without a config. Three layouts
are read: nested, flat (keys with slashes in them), and stacked (`deepmind_map.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gemma_qat.checkpoint.beside import beside, refuse_outside
from gemma_qat.checkpoint.deepmind_map import TOWERS, UNUSED_NAMES, canonical, places
from gemma_qat.checkpoint.maps import Foreign
from gemma_qat.checkpoint.moves import contiguous
from gemma_qat.checkpoint.source import UNUSED, LastRead, Leaf, Source
from gemma_qat.checkpoint.store import reason, refuse_large_chunks
from gemma_qat.errors import InputError, nearest
from gemma_qat.models.config import ModelConfig
from gemma_qat.models.declare import declare
from gemma_qat.models.sizes import SIZES
from gemma_qat.quant.sites import Parameter

_METADATA = "_METADATA"
"""The file in which Orbax lists the arrays of a tree."""

_FLOATS = ("float32", "bfloat16", "float16")


def tree_directories(directory: Path) -> list[Path]:
    """Returns the directories in which Orbax keeps a tree: this one, or what lies up to two levels below.

    Kaggle and DeepMind put the tree into a directory of its own beside the tokenizer, Orbax's managers under a step and
    an item. Trees in checkpoints of this project are none.
    """
    for pattern in (_METADATA, f"*/{_METADATA}", f"*/*/{_METADATA}"):
        paths = sorted(path.parent for path in directory.glob(pattern) if path.is_file())
        found = [path for path in paths if not (path.parent / "manifest.json").is_file()]
        if found:
            return found
    return []


class Tree:
    """The arrays of one Orbax tree by canonical name; read one at a time."""

    def __init__(self, directory: Path) -> None:
        """Lists the arrays.

        Raises: InputError when the directory holds no tree, several, or one that Orbax cannot read or that would have
            it read elsewhere or without bound: see `beside.refuse_outside`, `_refuse_strange_name` and
            `store.refuse_large_chunks`.
        """
        found = tree_directories(directory)
        if len(found) != 1:
            names = ", ".join(str(path.relative_to(directory)) for path in found) or "none"
            raise InputError(f"{directory}: one Orbax tree expected, found: {names}")
        refuse_outside(found[0], directory)
        self.directory = found[0].absolute()
        self._keys: dict[str, tuple[str, ...]] = {}
        self._arrays: dict[str, Any] = {}
        for keys, array in _flat(self._list()):
            name = canonical(keys)
            _refuse_strange_name(keys, self.directory)
            refuse_large_chunks(array, f"{self.directory}: {name}")
            if name in self._keys:
                raise InputError(
                    f"{directory}: {name} is there twice, as {'/'.join(self._keys[name])} and {'/'.join(keys)}"
                )
            self._keys[name], self._arrays[name] = keys, array

    def _list(self) -> Any:
        import orbax.checkpoint as ocp

        try:
            with ocp.PyTreeCheckpointer() as checkpointer:
                stored = checkpointer.metadata(self.directory).item_metadata
        except Exception as error:  # Orbax raises bare exceptions for files it cannot read
            raise InputError(f"{self.directory}: not an Orbax tree ({reason(error)})") from None
        if stored is None:  # Orbax logs why, and goes on
            raise InputError(f"{self.directory}: not an Orbax tree (its list of arrays is damaged)")
        return stored.tree

    @property
    def names(self) -> list[str]:
        """Canonical names."""
        return list(self._keys)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of an array without reading it."""
        return tuple(self._arrays[name].shape)

    def dtype(self, name: str) -> str:
        """Returns the number type of an array without reading it."""
        return np.dtype(self._arrays[name].dtype).name

    def read(self, name: str) -> np.ndarray:
        """Returns an array.

        Raises: InputError naming it when it cannot be read.
        """
        import orbax.checkpoint as ocp

        wanted: Any = self._arrays[name]
        arguments: Any = ocp.RestoreArgs(restore_type=np.ndarray)
        for key in reversed(self._keys[name]):
            wanted, arguments = {key: wanted}, {key: arguments}
        try:
            with ocp.PyTreeCheckpointer() as checkpointer:
                tree = checkpointer.restore(
                    self.directory, item=wanted, restore_args=arguments, partial_restore=True
                )
        except Exception as error:  # as above
            raise InputError(f"{self.directory}: {name} cannot be read ({reason(error)})") from None
        for key in self._keys[name]:
            tree = tree[key]
        return np.asarray(tree)

    def raw(self, name: str) -> Leaf:
        """Returns an array under its own name, to be passed on as it is."""
        shape, dtype = self.shape(name), self.dtype(name)
        size = int(np.prod(shape)) * np.dtype(self._arrays[name].dtype).itemsize
        return Leaf(
            path="/".join(self._keys[name]), shape=shape, dtype=dtype, bytes=size,
            read=lambda: self.read(name),
        )  # fmt: skip


def _refuse_strange_name(keys: tuple[str, ...], directory: Path) -> None:
    """Orbax makes a path of the keys, joined by points; some trees have slashes in theirs."""
    path = ".".join(keys)
    if path.startswith("/") or ".." in path.split("/") or not path.isprintable():
        raise InputError(f"{directory}: {path!r} is no name of an array")


def _flat(tree: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(tree, Mapping):
        for key, below in tree.items():
            yield from _flat(below, (*keys, str(key)))
    elif hasattr(tree, "shape") and hasattr(tree, "dtype"):
        yield keys, tree


def looks_like_deepmind(directory: Path) -> bool:
    """Returns whether a directory holds an Orbax tree with the names of a Gemma decoder."""
    if (directory / "manifest.json").is_file() or not tree_directories(directory):
        return False
    return "embedder/input_embedding" in Tree(directory).names


@contextlib.contextmanager
def open_deepmind(directory: Path, config: ModelConfig | None = None) -> Iterator[Source]:
    """Gives the decoder of an Orbax tree; names, shapes and number types are checked before it does.

    Raises: InputError when no size fits, naming the first difference from the nearest, or for arrays that no size has.
    """
    tree = Tree(directory)
    config, found = _match(tree, [config] if config else list(SIZES.values()))
    left = _left(tree, config, {place.name for place in found.values()})
    read = LastRead(tree.read, [p.name for p in found.values() if p.move.parts > 1])
    declared = declare(config)
    by_name = sorted(found, key=lambda path: found[path].name)
    above = tree.directory.parent
    yield Source(
        format="orbax", config=config, left=left,
        leaves=tuple(_leaf(declared[path], found[path], tree, read) for path in by_name),
        carried=tuple(tree.raw(name) for name, what in left.items() if what != UNUSED),
        beside=beside(directory, tree.directory, *([above] if above != directory.parent.absolute() else [])),
    )  # fmt: skip


def _leaf(parameter: Parameter, place: Foreign, tree: Tree, read: LastRead) -> Leaf:
    dtype = tree.dtype(place.name)
    if dtype not in _FLOATS:
        raise InputError(
            f"{tree.directory}: {place.name} is stored as {dtype}, one of {', '.join(_FLOATS)} expected"
        )
    return Leaf(
        path=parameter.path, shape=parameter.shape, dtype=dtype,
        bytes=parameter.size * (4 if dtype == "float32" else 2),
        read=lambda: contiguous(place.move.read(read(place.name), parameter)),
    )  # fmt: skip


def _match(tree: Tree, sizes: list[ModelConfig]) -> tuple[ModelConfig, dict[str, Foreign]]:
    """Returns the size whose arrays are all there in the right shape, and where they are."""
    stacks = any(name.startswith("stacked_layers/") for name in tree.names)
    differences = []
    for config in sizes:
        try:
            found = places(config, stacks=stacks)
        except InputError as error:
            differences.append((1, str(error)))
            continue
        wrong = _differences(tree, found, config)
        if not wrong:
            return config, found
        differences.append((len(wrong), f"{config.name}: {wrong[0]}"))
    raise InputError(f"{tree.directory}: no size fits; nearest {min(differences)[1]}")


def _differences(tree: Tree, found: dict[str, Foreign], config: ModelConfig) -> list[str]:
    wrong, there, declared = [], set(tree.names), declare(config)
    for path, place in found.items():
        if place.name not in there:
            wrong.append(f"{place.name} is missing")
        elif tree.shape(place.name) != place.move.shape(declared[path]):
            wanted = list(place.move.shape(declared[path]))
            wrong.append(
                f"{place.name} has shape {list(tree.shape(place.name))}, {wanted} expected"
            )
    layers = {name.split("/")[0] for name in there if name.startswith("layer_")}
    extra = layers - {f"layer_{index}" for index in range(config.layers)}
    return wrong + [f"{name} is one layer too many" for name in sorted(extra)]


def _left(tree: Tree, config: ModelConfig, wanted: set[str]) -> dict[str, str]:
    left = {}
    for name in sorted(set(tree.names) - wanted):
        tower = next((what for start, what in TOWERS.items() if name.startswith(start)), None)
        if tower:
            left[name] = tower
        elif _is_unused(name, config):
            left[name] = UNUSED
        else:
            raise InputError(
                f"{tree.directory}: unexpected array {name} (nearest: {nearest(name, wanted) or 'none'})"
            )
    return left


def _is_unused(name: str, config: ModelConfig) -> bool:
    """Whether an array is a key or value of a layer that shares another's."""
    layer, _, rest = name.partition("/")
    number = layer.removeprefix("layer_")
    first = config.layers - config.shared_kv_layers
    return rest in UNUSED_NAMES and number.isdigit() and int(number) >= first
