"""The saves of a run: written in the background, kept by a policy, read back onto any mesh.

In memory equal layers are stacked and split over the mesh; a save holds one layer an entry. Both ways are jitted with
the shardings of either side given, so no array is gathered, on no device and no host: each process writes and reads
the shards its devices hold. A save is the state after the step it is named after, with the codes of those masters.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_qat.checkpoint.manifest import Manifest
from gemma_qat.checkpoint.native import abstract_packed, codes_of, manifest_of
from gemma_qat.checkpoint.store import (
    check_arrays,
    discard,
    packed_arrays,
    read_manifest,
    restore_arrays,
    sweep,
)
from gemma_qat.errors import InputError
from gemma_qat.models import Fitted, ModelConfig
from gemma_qat.runs import latest_save, saves
from gemma_qat.train.distributed import is_first, spread, wait_for_all
from gemma_qat.train.lora import adapted_paths, is_factor
from gemma_qat.train.program import Program
from gemma_qat.train.state import Student, TrainState, by_group, by_layer


def save_shapes(model: Fitted | ModelConfig, program: Program) -> dict[str, dict[str, Any]]:
    """Returns the arrays of a save of a run by part and path, as shapes; allocates nothing."""
    _, factors, apart = _split(program)
    parts = {"parameters": dict(apart.parameters)}
    if isinstance(model, Fitted):
        parts["quantized"] = packed_arrays(abstract_packed(manifest_of(model, 0)))
    if factors:
        parts["adapters"] = program.student.unstack(factors)
    return parts | {"optimizer": _flat(apart.optimizer)}


def check_latest(directory: Path, model: Fitted | ModelConfig, program: Program) -> int | None:
    """Returns the step that a run with saves in `directory` goes on from, None where there are none; reads no array.

    Raises: InputError as `Saves.restore`, but for adapters of another start, which only the arrays tell.
    """
    save = latest_save(directory)
    if save is None:
        return None
    with _way_out(save):
        manifest = read_manifest(save)
        _refuse_other_model(save, manifest, model)
        _read_json(save / "data.json")
        for name, shapes in save_shapes(model, program).items():
            check_arrays(save / name, shapes)
    return manifest.step


def read_data(directory: Path) -> dict[str, Any]:
    """Returns what the newest save holds beside its arrays: the loader's state, the curves.

    Raises: InputError when it is damaged.
    """
    save = latest_save(directory)
    return {} if save is None else _read_json(save / "data.json")


def _split(program: Program) -> tuple[dict[str, Any], dict[str, Any], TrainState]:
    """Returns, as shapes: in-memory masters and scales; adapters; the state without adapters, a layer an entry."""
    abstract = program.abstract_state()
    factors = {path: leaf for path, leaf in abstract.parameters.items() if is_factor(path)}
    plain = {p: leaf for p, leaf in abstract.parameters.items() if p not in factors}
    return (
        plain,
        factors,
        by_layer(dataclasses.replace(abstract, parameters=plain), program.student),
    )


@contextlib.contextmanager
def _way_out(save: Path) -> Iterator[None]:
    """Adds to an error about a save which one is before it."""
    try:
        yield
    except (InputError, FileNotFoundError) as error:
        older = saves(save.parent)[:-1]
        way_out = "; there is no save before it"
        if older:
            way_out = f"; the save before it is {older[-1]}: move {save} away to go on from there"
        raise InputError(f"{error}{way_out}") from None


def _refuse_other_model(save: Path, manifest: Manifest, model: Fitted | ModelConfig) -> None:
    student = Student.of(model)
    if manifest.config != student.config or manifest.plans != student.plans:
        raise InputError(
            f"{save}: a checkpoint of another model or recipe ({manifest.config.name}, {manifest.recipe})"
        )


class Saves:
    """The saves of one run in `directory`; every process calls every method in the same order."""

    def __init__(
        self,
        directory: Path,
        model: Fitted | ModelConfig,
        program: Program,
        keep: int,
        keep_every: int,
    ) -> None:
        """Clears what an interrupted run left; `program` knows the state in memory, shapes with shardings.

        Kept are the newest `keep` saves and those at multiples of `keep_every` steps (0: none).
        """
        from gemma_qat.checkpoint.background import Writer

        abstract = program.abstract_state()
        self.directory, self._model, self._abstract = directory, model, abstract
        self._keep, self._keep_every = keep, keep_every
        student = self._student = program.student
        plain, factors, apart = _split(program)
        self._apart = apart
        self._factors = student.unstack(factors)
        self.cut = _jitted(program.merged, apart.parameters)
        self._cut_factors = _jitted(student.unstack, self._factors)
        self._join = _jitted(student.stack, plain)
        self._join_factors = _jitted(student.stack, factors)
        self._factor_paths = tuple(factors)
        self._bases = adapted_paths(plain, factors)
        self._cut_optimizer = _jitted(
            lambda inner: by_layer(TrainState((), {}, inner), student).optimizer, apart.optimizer
        )
        self._join_optimizer = _jitted(
            lambda inner: by_group(TrainState((), {}, inner), student).optimizer, abstract.optimizer
        )
        self._writer = Writer()
        if is_first():
            directory.mkdir(parents=True, exist_ok=True)
            sweep(directory)
        wait_for_all(f"swept {directory}")
        self.latest = latest_save(directory)

    def __enter__(self) -> Saves:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        """Waits for the save being written, after an error too: what it holds is good whatever happened later.

        Not after an error that other processes may not share: they might be gone, and the save with them.
        """
        if kind is None:
            self.finish()
            self._writer.close()
        elif issubclass(kind, InputError if jax.process_count() > 1 else Exception):
            with contextlib.suppress(InputError):  # What went wrong first is what is raised.
                self._writer.wait()

    def save(self, state: TrainState, step: int, data: Mapping[str, Any]) -> None:
        """Begins to write the state after `step` steps; returns when the state may be changed.

        `data` (the iterator's state, the curves) goes to data.json.
        Raises: InputError when this save cannot begin or the one before it failed.
        """
        name = self.directory / str(step)
        self.finish()
        if name.is_dir():
            return  # Asked to stop right after a save that was due.
        masters: dict[str, Any] = {}

        def parameters() -> dict[str, Any]:
            masters.update(self.cut(state.parameters))
            return masters

        parts: dict[str, Callable[[], Mapping[str, Any]]] = {"parameters": parameters}
        if isinstance(self._model, Fitted):
            fitted = self._model
            parts["quantized"] = lambda: codes_of(masters, fitted)
        if self._factors:
            factors = {path: state.parameters[path] for path in self._factor_paths}
            parts["adapters"] = lambda: self._cut_factors(factors)
        parts["optimizer"] = lambda: _flat(self._cut_optimizer(state.optimizer))
        if self._bases:
            base = _sums({path: state.parameters[path] for path in self._bases})
            data = {**data, "base": base}
        manifest = manifest_of(self._model, step).to_json()
        self._writer.save(name, parts, {"data.json": data, "manifest.json": manifest})

    def check(self) -> None:
        """Raises InputError when a save in the background is known to have failed."""
        self._writer.check()

    def finish(self) -> None:
        """Waits for the save being written and deletes those that the policy does not keep.

        Raises: InputError when it failed.
        """
        self._writer.wait()
        if is_first():
            for old in saves(self.directory)[: -self._keep]:
                if not self._keep_every or int(old.name) % self._keep_every:
                    discard(old)

    def restore(self, adapted: Mapping[str, Any]) -> tuple[TrainState, int, dict[str, Any]]:
        """Returns the state of the latest save on this run's mesh, its step, and what is in data.json.

        `adapted` are the masters that have adapters, as the run began with them: a save holds them with the adapters
        added, which is what everybody else wants.
        Raises: InputError when it is another model's or damaged, naming the save before it.
        """
        assert self.latest is not None
        with _way_out(self.latest):
            return self._read(self.latest, adapted)

    def _read(
        self, save: Path, adapted: Mapping[str, Any]
    ) -> tuple[TrainState, int, dict[str, Any]]:
        manifest = read_manifest(save)
        _refuse_other_model(save, manifest, self._model)
        data = _read_json(save / "data.json")
        if data.pop("base", {}) != _sums(adapted):
            raise InputError(
                f"{save}: its adapters were trained on another start than the one given now"
            )
        # One part after the other: what is read and its stacked copy are in memory together.
        parameters = self._join(restore_arrays(save / "parameters", self._apart.parameters))
        if self._factors:
            factors = self._join_factors(restore_arrays(save / "adapters", self._factors))
            parameters = parameters | factors | dict(adapted)
        named = _flat(self._apart.optimizer)
        arrays = restore_arrays(save / "optimizer", named)
        shape = jax.tree.structure(self._apart.optimizer)
        optimizer = self._join_optimizer(jax.tree.unflatten(shape, [arrays[n] for n in named]))
        step = spread(np.asarray(manifest.step, np.int32), self._abstract.step.sharding)
        return TrainState(step, parameters, optimizer), manifest.step, data


def _sums(arrays: Mapping[str, Any]) -> dict[str, int]:
    """Returns for each array the sum of its scrambled words: the same on every mesh, and another for other numbers."""
    found = jax.jit(lambda tree: jax.tree.map(_scrambled, tree))(dict(arrays)) if arrays else {}
    return {path: int(value) for path, value in found.items()}


def _scrambled(x: jax.Array) -> jax.Array:
    # Scrambled before they are added up: doubling every weight adds the same to every word, which may come to nothing.
    words = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    words = (words ^ (words >> 15)) * jnp.uint32(0x85EBCA6B)
    return jnp.sum((words ^ (words >> 13)) * jnp.uint32(0xC2B2AE35), dtype=jnp.uint32)


def _jitted(change: Callable[[Any], Any], to: Any) -> Callable[[Any], Any]:
    """Returns the jitted change of form, onto the shardings of `to`.

    Its results never share a buffer with what it is given, which a later step may overwrite.
    """
    where = jax.tree.map(lambda leaf: leaf.sharding, to)
    return jax.jit(lambda tree: jax.tree.map(jnp.copy, change(tree)), out_shardings=where)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: cannot be restored ({error})") from None


def _flat(tree: Any) -> dict[str, Any]:
    """Returns the leaves of an optimizer state by a path without slashes inside names."""
    found, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path).replace("/", "|"): leaf for path, leaf in found}
