"""The training loop: batches in, checkpoints and metrics out, and a resume that equals not stopping.

Everything that a later step depends on is in a save: parameters, optimizer state, step count, and the data iterator's
state. The loss and learning rate are functions of the step alone, so a run that is stopped after any save and started
again does the same arithmetic on the same batches, bit for bit on one mesh.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import numpy as np

from gemma_qat.checkpoint.native import load_parameters, save_model
from gemma_qat.checkpoint.store import read_manifest, restore_arrays
from gemma_qat.errors import InputError, unknown
from gemma_qat.models import Fitted, ModelConfig, RunOptions
from gemma_qat.sharding import MeshConfig, Placement, make_mesh
from gemma_qat.train.losses import LOSSES
from gemma_qat.train.optimizer import OptimizerConfig, make_optimizer
from gemma_qat.train.state import Student, TrainState, by_group, by_layer, start, state_shardings
from gemma_qat.train.step import Fixed, make_step

Curve = list[tuple[int, float]]
Progress = Callable[[str, int, int], None]


@runtime_checkable
class Loader(Protocol):
    """Batches without end, with a state that can be saved."""

    def __next__(self) -> Mapping[str, np.ndarray]: ...
    def get_state(self) -> Any: ...  # noqa: D102 (said above)
    def set_state(self, state: Any) -> None: ...  # noqa: D102


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, on what loss, and how often to look and to save.

    Units: steps count updates, batch_size rows over all devices; save_every 0 saves at the end only; loss_chunk is
    positions per chunk of the loss (0: all at once). Weights are rounded from step `weights_from` on, activations, keys
    and values from step `activations_from` (never before the weights); scales are those of the start until then.
    """

    steps: int = 1000
    batch_size: int = 8
    loss: str = "ce"
    seed: int = 0
    log_every: int = 20
    save_every: int = 0
    keep: int = 2
    loss_chunk: int = 0
    microbatches: int = 1
    weights_from: int = 0
    activations_from: int = 0

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise unknown("loss", self.loss, LOSSES)
        if self.weights_from < 0 or self.activations_from < 0:
            raise ValueError("weights_from and activations_from are steps, at least 0 expected")

    def phase(self, step: int) -> Literal["all", "weights", "none"]:
        """Returns what is quantized in the update that follows `step` updates."""
        if step < self.weights_from:
            return "none"
        return "weights" if step < self.activations_from else "all"


@dataclasses.dataclass(frozen=True)
class Trained:
    """Parameters by checkpoint path and what was measured on the way."""

    parameters: dict[str, jax.Array]
    curves: dict[str, Curve]


def train(
    model: Fitted | ModelConfig,
    parameters: Mapping[str, Any],
    loader: Loader,
    config: TrainConfig,
    optimizer_config: OptimizerConfig,
    *,
    mesh_config: MeshConfig = MeshConfig(),
    options: RunOptions = RunOptions(),
    teacher: tuple[ModelConfig, Mapping[str, Any]] | None = None,
    directory: Path | None = None,
    progress: Progress | None = None,
    label: str = "train",
) -> Trained:
    """Trains for `config.steps` steps and returns the parameters, resuming from `directory` if it holds a save.

    `parameters` (by checkpoint path) are where a fresh run starts; they are copied.
    Raises: InputError when the loss turns to NaN, naming the step, or when `directory` belongs to another model.
    """
    student, mesh = Student.of(model), make_mesh(mesh_config)
    leaves = student.stack(parameters)
    optimizer = make_optimizer(optimizer_config, config.steps, leaves)
    where = state_shardings(student, optimizer, leaves, mesh, mesh_config.preset)
    guide = Student.of(teacher[0]) if teacher else None
    fixed = Fixed()
    if teacher and guide:
        placed = jax.device_put(guide.stack(teacher[1]), guide.shardings(mesh, mesh_config.preset))
        fixed = Fixed(teacher=jax.jit(lambda leaves: guide.ready(leaves, options))(placed))

    @functools.cache
    def step_of(phase: Literal["all", "weights", "none"]) -> Any:
        # Each phase is a program of its own, compiled when it begins; what does not happen costs nothing.
        return make_step(
            student, optimizer, where, mesh, loss=config.loss, teacher=guide,
            chunk=config.loss_chunk, microbatches=config.microbatches,
            options=dataclasses.replace(options, quantize=phase),
            placement=Placement(mesh, mesh_config.preset),
        )  # fmt: skip

    state = start(optimizer, leaves, where)
    curves: dict[str, Curve] = {}
    last = latest_save(directory) if directory else None
    if last:
        state, curves = _restore(last, state, where, student, model, loader)
    pending: list[tuple[int, dict[str, jax.Array]]] = []
    while int(state.step) < config.steps:
        batch: dict[str, Any] = {name: np.asarray(array) for name, array in next(loader).items()}
        batch.pop("ids", None)  # which rows they are is for a person to know
        state, metrics = step_of(config.phase(int(state.step)))(state, batch, fixed)
        number = int(state.step)
        pending.append((number, metrics))
        if number % config.log_every == 0 or number == config.steps:
            _record(curves, pending)
            pending = []
            if progress:
                progress(label, number, config.steps)
        due = config.save_every and number % config.save_every == 0
        if directory and (due or number == config.steps):
            _save(directory, state, student, model, loader, curves, config.keep)
    return Trained(by_layer(state, student).parameters, curves)


def _record(curves: dict[str, Curve], pending: list[tuple[int, dict[str, jax.Array]]]) -> None:
    """Adds the mean of each metric since the last record.

    Raises: InputError when the loss is not finite, naming the step.
    """
    host = [(number, {k: float(v) for k, v in metrics.items()}) for number, metrics in pending]
    for number, metrics in host:
        if not np.isfinite(metrics["loss"]):
            raise InputError(
                f"step {number}: the loss is {metrics['loss']}; nothing was saved over the last good step"
            )
    for name in host[0][1]:
        mean = float(np.mean([metrics[name] for _, metrics in host]))
        curves.setdefault(name, []).append((host[-1][0], mean))


def saves(directory: Path) -> list[Path]:
    """Returns the complete saves of a run, oldest first."""
    found = [path for path in directory.glob("*") if re.fullmatch(r"\d+", path.name)]
    return sorted((p for p in found if (p / "manifest.json").is_file()), key=lambda p: int(p.name))


def latest_save(directory: Path) -> Path | None:
    """Returns the newest complete save of a run, if there is one."""
    found = saves(directory)
    return found[-1] if found else None


def _save(
    directory: Path,
    state: TrainState,
    student: Student,
    model: Fitted | ModelConfig,
    loader: Loader,
    curves: dict[str, Curve],
    keep: int,
) -> None:
    apart = by_layer(state, student)
    number = int(state.step)
    data = {"loader": _jsonable(loader.get_state()), "curves": curves}
    save_model(
        directory / str(number), apart.parameters, model, step=number,
        extra={"optimizer": _flat(apart.optimizer)}, data=data,
    )  # fmt: skip
    for old in saves(directory)[:-keep]:
        shutil.rmtree(old)


def _restore(
    save: Path,
    state: TrainState,
    where: TrainState,
    student: Student,
    model: Fitted | ModelConfig,
    loader: Loader,
) -> tuple[TrainState, dict[str, Curve]]:
    manifest = read_manifest(save)
    config = model if isinstance(model, ModelConfig) else model.config
    if manifest.config != config or manifest.plans != student.plans:
        raise InputError(
            f"{save}: a checkpoint of another model or recipe ({manifest.config.name}, {manifest.recipe})"
        )
    _, parameters = load_parameters(save)
    like = by_layer(state, student).optimizer
    names = list(_flat(like))
    restored = restore_arrays(save / "optimizer", {n: _abstract(x) for n, x in _flat(like).items()})
    leaves = jax.tree.leaves(like)
    rebuilt = jax.tree.unflatten(jax.tree.structure(like), [restored[name] for name in names])
    assert len(names) == len(leaves)
    apart = TrainState(np.asarray(manifest.step, np.int32), parameters, rebuilt)  # type: ignore[arg-type]
    together = jax.device_put(by_group(apart, student), where)
    data = json.loads((save / "data.json").read_text("utf-8"))
    loader.set_state(_from_jsonable(data["loader"]))
    curves = {
        name: [(int(s), float(v)) for s, v in curve] for name, curve in data["curves"].items()
    }
    return together, curves


def _flat(tree: Any) -> dict[str, Any]:
    """Returns the leaves of an optimizer state by a path without slashes inside names."""
    found, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path).replace("/", "|"): leaf for path, leaf in found}


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _jsonable(state: Any) -> Any:
    return {"bytes": state.hex()} if isinstance(state, bytes) else state


def _from_jsonable(state: Any) -> Any:
    return (
        bytes.fromhex(state["bytes"])
        if isinstance(state, dict) and set(state) == {"bytes"}
        else state
    )
